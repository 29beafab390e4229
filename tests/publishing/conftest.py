"""A Model Registry, and models with scores of made-up hypotheses."""

import json
import os
from dataclasses import asdict

import pytest

from slam_asr.artifacts.hypotheses import HYPOTHESES, Hypothesis, write_hypotheses
from slam_asr.artifacts.model_folder import CONFIG, ModelConfig
from slam_asr.artifacts.stage_record import Outcome, run_stage
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.stages.score import score
from tests.publishing.server import model_registry


@pytest.fixture
def registry(monkeypatch):
    """The state of a Model Registry; the environment names its address."""
    for name in ("MODEL_REGISTRY_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # The client reads all certificates before each request, even over plain HTTP, which takes 0.1 s.
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with model_registry() as (state, address):
        monkeypatch.setenv("MODEL_REGISTRY_URL", address)
        yield state


@pytest.fixture
def trained(tmp_path):
    """Return a function that writes a model and its scores, with errors in every `wrong`-th utterance."""

    def write(name: str, wrong: int, utterances: int = 60) -> tuple[str, str]:
        training = {"recipe": "demo", "steps": len(name), "name": name}
        config = ModelConfig(dump_recipe(load_recipe("demo")), "e", "l", 8, 8, training=training)

        def convert(folder):
            (folder / CONFIG).write_text(json.dumps(asdict(config)))
            return Outcome("a model")

        inputs = {"training": {"manifests": {"train": "a1", "dev": "b2"}, "seed": name}}
        model = run_stage("convert-checkpoint", str(tmp_path / name / "model"), inputs, convert).folder
        rows = [
            Hypothesis(f"u{i}", "one two three four", "one two" if i % wrong == 0 else "one two three four")
            for i in range(utterances)
        ]

        def decode(folder):
            write_hypotheses(folder / HYPOTHESES, rows)
            return Outcome("", {}, {"utterances": len(rows)})

        part = run_stage(
            "decode",
            str(tmp_path / name / "decoded"),
            {"model": name, "manifests": ["c3"], "part": "1-of-1"},
            decode,
        ).folder
        return model, score(load_recipe("demo"), model, [part], str(tmp_path / name / "scores")).folder

    return write


@pytest.fixture
def recipe_with():
    """Return a function that makes a recipe with some keys of the sections gate and publish."""

    def load(**keys) -> Recipe:
        values = {"publish.registry": "kubeflow"} | {key.replace("__", "."): v for key, v in keys.items()}
        return load_recipe("demo", values)

    return load
