"""Code that comes with a model runs only if the user's recipe allows it, and no question is ever asked."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

from slam_asr.artifacts.model_folder import read_config
from slam_asr.cli import run
from slam_asr.config.recipe import Llm, load_recipe
from slam_asr.decoding.model import open_model
from slam_asr.errors import ModelError
from slam_asr.models.llm import load_llm, require_usable_llm
from slam_asr.models.projector import build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.decode import decode
from slam_asr.stages.extract_features import extract_features
from slam_asr.stages.plan import plan
from slam_asr.stages.train import train
from slam_asr.stages.transcribe import transcribe
from tests.conftest import write_wav

ROOT = Path(__file__).parents[2]
CALLS = ("from_pretrained", "from_config")
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("folder", ["slam_asr", "components", "pipelines", "demo"])
def test_every_call_that_could_run_a_models_code_states_whether_it_may(folder):
    calls = [
        (file.relative_to(ROOT), node)
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS
    ]
    assert folder != "slam_asr" or len(calls) >= 6
    unstated = [
        f"{file}:{call.lineno}"
        for file, call in calls
        if "trust_remote_code" not in [keyword.arg for keyword in call.keywords]
    ]
    assert not unstated, "transformers would ask on the terminal, and a user may answer yes"


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that exists once a model's code has run."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def questions(monkeypatch, tmp_path) -> list[str]:
    """Answer each question on the terminal with yes; return the list of the questions."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return asked


def plant(folder: str, into: Path, where: str, marker: Path) -> str:
    """Copy a model, and make its configuration, tokenizer or network need code that comes with the copy."""
    shutil.copytree(folder, into)
    (into / "code_x.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((into / "config.json").read_text())
    if where == "configuration":
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code_x.Config", "AutoModelForCausalLM": "code_x.Model"},
        }
    elif where == "network":
        # transformers knows this type, but has no causal LM for it.
        config = {
            "model_type": "clip",
            "auto_map": {"AutoConfig": "code_x.Config", "AutoModelForCausalLM": "code_x.Model"},
        }
    (into / "config.json").write_text(json.dumps(config))
    if where == "tokenizer":
        (into / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": [None, "code_x.Tokenizer"]}})
        )
    return str(into)


@pytest.fixture
def run_with(tmp_path, tiny_recipe, model):
    """Return a function that runs a stage with some recipe keys changed."""
    write_wav(tmp_path / "0.wav")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"key": "a", "source": "0.wav", "target": "one", "duration": 1.0}) + "\n")
    weights = build_projector(load_recipe(str(tiny_recipe)).projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{n}": t for n, t in weights.items()}, tmp_path / "x.pt")

    def run_stage(stage: str, **overrides) -> None:
        recipe, out = load_recipe(str(tiny_recipe), overrides), str(tmp_path / "out")
        {
            "plan": lambda: plan(recipe),
            "extract-features": lambda: extract_features(recipe, [str(manifest)], out),
            "train": lambda: train(recipe, str(manifest), out),
            "convert-checkpoint": lambda: convert_checkpoint(str(tmp_path / "x.pt"), out, recipe=recipe),
            "decode": lambda: decode(recipe, model, [str(manifest)], out),
            "transcribe": lambda: transcribe(recipe, [str(tmp_path / "0.wav")], model),
        }[stage]()

    return run_stage


@pytest.mark.real_input("B08-custom-code-asked-for")
@pytest.mark.parametrize(
    ("stage", "where"),
    [
        *(
            (stage, "configuration")
            for stage in ("plan", "train", "convert-checkpoint", "decode", "transcribe")
        ),
        *((stage, "network") for stage in ("plan", "train", "convert-checkpoint", "decode")),
        *((stage, "tokenizer") for stage in ("train", "convert-checkpoint", "decode")),
    ],
)
def test_an_llms_own_code_is_refused_by_name(
    tmp_path, tiny_models, run_with, marker, questions, stage, where
):
    name = plant(tiny_models["llm"], tmp_path / "llm", where, marker)
    with pytest.raises(ModelError) as refused:
        run_with(stage, **{"llm.name": name})
    assert name in str(refused.value) and "--llm.trust_remote_code true" in str(refused.value)
    assert "\n" not in refused.value.args[0] and not questions and not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stage", ["plan", "extract-features", "train", "convert-checkpoint", "decode", "transcribe"]
)
def test_an_encoders_own_code_is_refused(tmp_path, tiny_models, run_with, marker, questions, stage):
    name = plant(tiny_models["encoder"], tmp_path / "encoder", "configuration", marker)
    with pytest.raises(ModelError, match="needs Python code of its own, which is not run") as refused:
        run_with(stage, **{"encoder.name": name})
    assert name in str(refused.value) and not questions and not marker.exists()


def test_attention_from_the_hub_is_code_too(tmp_path, tiny_models):
    folder = Path(shutil.copytree(tiny_models["llm"], tmp_path / "llm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    with pytest.raises(ModelError, match="needs attention from someone/kernel, which is not run"):
        require_usable_llm(folder, Llm())


def test_the_recipes_key_lets_the_llms_code_run_but_a_model_folders_recipe_does_not(
    tmp_path, tiny_recipe, tiny_models, run_with, marker, questions
):
    name = plant(tiny_models["llm"], tmp_path / "llm", "configuration", marker)
    trusted = load_recipe(str(tiny_recipe), {"llm.name": name, "llm.trust_remote_code": True})
    run_with("convert-checkpoint", **{"llm.name": name, "llm.trust_remote_code": True})
    assert marker.exists()
    ours = load_llm(Path(name), torch.float32, trust_remote_code=True)
    assert type(ours).__module__.startswith("transformers_modules")
    theirs = load_llm(Path(tiny_models["llm"]), torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[n]) for n, tensor in ours.state_dict().items())

    made = str(tmp_path / "out")
    assert read_config(made).typed_recipe.llm.trust_remote_code
    assert open_model(made, trusted).llm_folder == Path(name)
    with pytest.raises(ModelError, match=r"set --llm\.trust_remote_code true"):
        open_model(made)
    with pytest.raises(ModelError, match=r"set --llm\.trust_remote_code true"):
        run("transcribe", [made, str(tmp_path / "0.wav")])
    assert not questions
