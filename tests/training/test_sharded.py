"""An LLM read weight by weight trains like a completely loaded one, in less memory per process."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slam_asr.errors import UserError
from slam_asr.models.llm import load_llm
from slam_asr.pretrained.meta_llm import NotLazilyLoadable, describe_lazy_llm
from tests.damage import damage
from tests.ranks import run_on_ranks
from tests.training import memory_program, sharded_program
from tests.training.sharded_program import ENGINES, STEPS, TUNINGS

SIZES = {
    "hidden_size": 30,
    "intermediate_size": 45,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 101,
}
"""Sizes of the LLMs. Most are odd, so that processes have unequal shards."""
FAMILIES = {
    # name: (transformers' model type, changes to SIZES, maximum size of a file)
    "llama-tied": ("llama", {"tie_word_embeddings": True}, "20KB"),
    "llama-one-file": ("llama", {}, "1GB"),
    "gpt-2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0},
        "20KB",
    ),
    "gemma-3": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "tie_word_embeddings": True},
        "20KB",
    ),
    "gpt-neox": ("gpt_neox", {"num_attention_heads": 3, "max_position_embeddings": 128}, "20KB"),
}


def write(folder: Path, family: str) -> Path:
    kind, changes, largest = FAMILIES[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        **{**SIZES, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **changes}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / family, max_shard_size=largest)
    return folder / family


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama-tied", "gpt-2", *(["llama-one-file"] if os.environ.get("SLAM_ASR_SOAK") else [])]
)
def test_losses_equal_those_of_a_completely_loaded_llm(tmp_path, family):
    write(tmp_path, family)
    losses = json.loads((run_on_ranks(sharded_program.__file__, 2, tmp_path) / "losses.json").read_text())
    for kind in ENGINES:
        for tuning in TUNINGS:
            complete, sharded = (losses[f"{family} {kind} {tuning} {way}"] for way in ("complete", "sharded"))
            assert sharded == complete and len(set(complete)) == STEPS


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """An LLM of 285 MB in fp16, in five files."""
    folder = tmp_path_factory.mktemp("big")
    config = CONFIG_MAPPING["llama"](
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, vocab_size=4096
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(
        folder, max_shard_size="60MB"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_no_process_needs_memory_for_the_complete_llm(big, tmp_path, kind):
    """The limit of 0.75 allows for half of the LLM and DeepSpeed itself: about 45 MB, a sixth of this LLM."""
    peaks = {}
    # One engine suffices to show that this measurement notices a completely loaded LLM.
    first = kind == next(iter(ENGINES)) or os.environ.get("SLAM_ASR_SOAK")
    for way in ("complete", "sharded") if first else ("sharded",):
        folder = tmp_path / f"{kind} {way}"
        folder.mkdir()
        (folder / "llm").symlink_to(big)
        peaks[way] = json.loads(
            (run_on_ranks(memory_program.__file__, 2, folder) / "memory.json").read_text()
        )
    assert min(peaks.get("complete", [2])) > 1
    assert max(peaks["sharded"]) < 0.75


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt-neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lazily_read_llm_equals_a_loaded_one(tmp_path, family, dtype):
    folder = write(tmp_path, family)
    complete = load_llm(folder, dtype)
    llm, lazy_weights = describe_lazy_llm(folder, dtype)
    assert all(p.is_meta for p in llm.parameters())
    for weight in lazy_weights:
        part = torch.empty((1, *weight.parameter.shape[1:]), dtype=dtype)
        weight.read_into(part, first_row=2)
        weight.put(weight.read_into(torch.empty_like(weight.parameter, device="cpu")))
        assert torch.equal(part[0], weight.parameter[2])
    assert len(list(llm.parameters())) == len(list(complete.parameters())) == len(lazy_weights)
    theirs = complete.state_dict() | dict(complete.named_buffers())
    ours = llm.state_dict() | dict(llm.named_buffers())
    assert theirs.keys() == ours.keys() and not any(p.requires_grad for p in llm.parameters())
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    ids = torch.arange(9)[None]
    assert torch.equal(llm(ids).logits, complete(ids).logits)
    assert llm.generation_config.to_dict() == complete.generation_config.to_dict()


def test_an_llm_whose_weights_transformers_renames_is_not_read_lazily(tmp_path):
    folder = write(tmp_path, "gpt-neox")
    assert "embed_out.weight" in {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    with pytest.raises(NotLazilyLoadable, match="other names"):
        describe_lazy_llm(folder, torch.float32)
    assert load_llm(folder, torch.float32)


def test_a_base_models_weight_names_without_prefix_are_recognised(tmp_path):
    folder = write(tmp_path, "llama-one-file")
    file = folder / "model.safetensors"
    save_file(
        {key.removeprefix("model."): tensor for key, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    _, lazy_weights = describe_lazy_llm(folder, torch.float32)
    assert {weight.key for weight in lazy_weights} == {
        weight.name.removeprefix("model.") for weight in lazy_weights
    }


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "cut", "tied twice", "no safetensors"])
def test_damage_is_reported_as_for_a_completely_loaded_llm_or_the_llm_is_not_read_lazily(tmp_path, fault):
    folder = write(tmp_path, "llama-one-file")
    file = folder / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    damage(file, name, fault)
    if fault == "no safetensors":
        file.unlink()
    elif fault == "tied twice":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if fault in ("tied twice", "no safetensors"):
        with pytest.raises(
            NotLazilyLoadable, match="twice" if fault == "tied twice" else "not saved as safetensors"
        ):
            describe_lazy_llm(folder, torch.float32)
        return
    with pytest.raises(UserError) as complete:
        load_llm(folder, torch.float32)
    with pytest.raises(UserError) as sharded:
        for weight in describe_lazy_llm(folder, torch.float32)[1]:
            weight.read_into(torch.empty_like(weight.parameter, device="cpu"))
    assert str(sharded.value) == str(complete.value)
    assert ("cannot be loaded" if fault == "cut" else name) in str(complete.value)
