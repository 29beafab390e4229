"""A model larger than memory can be converted, because its weights are processed one by one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slam_asr.config.recipe import load_recipe
from slam_asr.conversion import tuned
from slam_asr.models.llm import add_lora
from slam_asr.models.projector import build_projector
from slam_asr.pretrained.lazy_tensors import LazyTensors, lazy_tensors, write_one_by_one
from slam_asr.pretrained.meta_llm import NotLazilyLoadable
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conversion import memory_program
from tests.conversion.test_kinds import LORA, deepspeeds_folder

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}


def trained(tiny_recipe, folder: Path, overrides: dict, tied: bool = True, **sizes: int) -> tuple[Path, Path]:
    """Write a recipe with an LLM of the given sizes, and a ZeRO checkpoint of it; return their paths."""
    base = load_recipe(str(tiny_recipe)).llm.name
    torch.manual_seed(7)
    llm = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(base, tie_word_embeddings=tied, **sizes)
    )
    llm.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    values = {**yaml.safe_load(tiny_recipe.read_text()), "name": "own"}
    for key, value in {"llm.name": str(folder / "base"), **overrides}.items():
        section, _, name = key.partition(".")
        rest, _, last = name.rpartition(".")
        target = values.setdefault(section, {})
        for part in filter(None, rest.split(".")):
            target = target.setdefault(part, {})
        target[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(path))
    if recipe.llm.tuning == "lora":
        add_lora(llm, recipe.llm.lora, seed=1)
    own = {
        f"llm.{name}": torch.randn(p.shape)
        for name, p in llm.named_parameters()
        if recipe.llm.tuning == "full" or ".lora_" in name
    }
    projector = build_projector(recipe.projector, 16, llm.config.hidden_size, seed=1).state_dict()
    weights = {f"projector.{name}": tensor for name, tensor in projector.items()} | own
    return path, deepspeeds_folder(folder / "checkpoint", weights, ranks=4, prefix="")


TUNINGS = {
    "full": ({"llm.tuning": "full", "training.precision": "bf16"}, "model"),
    "lora": ({**LORA, "training.precision": "bf16"}, "llm"),
}
"""Changes to the recipe, and the format to convert to, keyed by the LLM's tuning."""


@pytest.mark.cold
@pytest.mark.slow
@pytest.mark.parametrize("kind", TUNINGS)
def test_no_more_than_a_few_weights_are_in_memory_at_once(tiny_recipe, tmp_path, kind):
    overrides, to = TUNINGS[kind]
    small, large = (
        trained(tiny_recipe, tmp_path / "small", overrides),
        trained(tiny_recipe, tmp_path / "large", overrides, **SIZES),
    )
    command = [
        sys.executable,
        "-m",
        memory_program.__name__,
        to,
        *small,
        tmp_path / "a",
        *large,
        tmp_path / "b",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    # The complete model is more than four times as large as its largest weight.
    taken = float(done.stdout.splitlines()[-1])
    print(f"{kind}: {taken:.2f} times the largest weight")
    assert taken < 2.5


@pytest.mark.cold
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TUNINGS)
def test_an_llm_written_weight_by_weight_equals_one_written_at_once(
    tiny_recipe, tmp_path, monkeypatch, kind, tied
):
    overrides, to = TUNINGS[kind]
    recipe, checkpoint = trained(tiny_recipe, tmp_path, overrides, tied)
    convert_checkpoint(str(checkpoint), str(tmp_path / "by-weight"), to=to, recipe=load_recipe(str(recipe)))

    def refuse(*_):
        raise NotLazilyLoadable

    monkeypatch.setattr(tuned, "describe_lazy_llm", refuse)
    convert_checkpoint(str(checkpoint), str(tmp_path / "complete"), to=to, recipe=load_recipe(str(recipe)))
    names = sorted(
        str(p.relative_to(tmp_path / "complete")) for p in (tmp_path / "complete").rglob("*") if p.is_file()
    )
    assert names == sorted(
        str(p.relative_to(tmp_path / "by-weight")) for p in (tmp_path / "by-weight").rglob("*") if p.is_file()
    )
    for name in names:
        ours, theirs = tmp_path / "by-weight" / name, tmp_path / "complete" / name
        if name.endswith(".safetensors"):
            ours, theirs = load_file(ours), load_file(theirs)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
        elif name != "stage.json":
            assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.cold
def test_a_file_whose_tensors_were_written_one_by_one_is_read_by_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "half": torch.randn(3).half(),
        "flag": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).t(),
        "Ärmel": torch.arange(3, dtype=torch.int32),
    }
    write_one_by_one(
        tmp_path / "x.safetensors",
        LazyTensors({name: lambda t=t: t for name, t in tensors.items()}),
        {n: t.to("meta") for n, t in tensors.items()},
    )
    found = load_file(tmp_path / "x.safetensors")
    lazily = lazy_tensors([tmp_path / "x.safetensors"])
    assert found.keys() == tensors.keys() == lazily.keys()
    for name, tensor in tensors.items():
        assert (
            found[name].dtype == tensor.dtype
            and torch.equal(found[name], tensor)
            and torch.equal(lazily[name], tensor)
        )
    with pytest.raises(ValueError, match="b is"):
        write_one_by_one(tmp_path / "y.safetensors", {"b": torch.zeros(1)}, {"b": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
