"""Fused kernels change results by rounding only, and no batch causes a recompilation."""

import functools
import importlib.util
import json
import os
import sys
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slam_asr.config.recipe import Projector, load_recipe, settings_that_affect_weights
from slam_asr.models.answer_loss import score_in_chunks
from slam_asr.models.batch import Row, collate, pack
from slam_asr.models.llm import checkpoint_layers
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.projector import build_projector
from slam_asr.models.slam import Slam
from slam_asr.training.kernels import compile_layers, use_liger
from tests.ranks import run_on_ranks
from tests.training import kernels_program


def tiny(checkpointing: bool = False) -> Slam:
    torch.manual_seed(0)
    llm = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        .eval()
        .requires_grad_(False)
    )
    assert allow_packing(llm)
    if checkpointing:
        checkpoint_layers(llm)
    model = Slam(build_projector(Projector(hidden=8), 16, 32, 0), llm)
    model.scorer = score_in_chunks
    return model.train()


def rows(*lengths: int) -> list[Row]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [Row(torch.randn(5 * n, 16, generator=generator), n, [], [3, 4], [5 + n, 7, 1]) for n in lengths]


def step(model: Slam, batch) -> list[torch.Tensor]:
    """Return the loss and the projector's gradients."""
    model.zero_grad()
    loss, _ = model(batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.projector.parameters())]


@pytest.fixture
def graphs():
    """Discard all compiled graphs; return a function that counts those that are compiled afterwards."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def without_a_compiler(monkeypatch, graphs):
    """Layers are traced as for a compiler, but run as torch's own operations."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lay_out", "checkpointing"),
    [
        (pack, False),
        (collate, True),
        *([(pack, True), (collate, False)] if os.environ.get("SLAM_ASR_SOAK") else []),
    ],
)
def test_traced_layers_compute_the_same(lay_out, checkpointing, without_a_compiler, graphs):
    uncompiled, compiled = tiny(), tiny(checkpointing)
    names = list(compiled.state_dict())
    compile_layers(compiled.llm)
    assert list(compiled.state_dict()) == names
    for lengths in ((4, 9), (3, 8, 2, 5), (7,)):
        for ours, theirs in zip(
            step(compiled, lay_out(rows(*lengths))), step(uncompiled, lay_out(rows(*lengths))), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert graphs() > 0


@pytest.mark.slow
def test_no_batch_causes_a_recompilation(without_a_compiler, graphs):
    model = tiny()
    compile_layers(model.llm)
    step(model, pack(rows(4, 9)))
    compiled = graphs()
    for lengths in ((5, 3, 8), (6, 2), (9, 9, 4, 3, 2, 7), (12,)):
        step(model, pack(rows(*lengths)))
    assert graphs() == compiled > 0


@pytest.mark.slow
def test_generated_code_computes_the_same(graphs):
    uncompiled, compiled = tiny(), tiny()
    compile_layers(compiled.llm)
    for ours, theirs in zip(
        step(compiled, pack(rows(4, 9, 3))), step(uncompiled, pack(rows(4, 9, 3))), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert graphs() > 0


@pytest.mark.slow
def test_every_engine_takes_the_same_steps_with_compiled_layers(tmp_path):
    folder = run_on_ranks(kernels_program.__file__, 2, tmp_path)
    for kind, (uncompiled, compiled) in json.loads((folder / "losses.json").read_text()).items():
        assert len(set(uncompiled)) == 4 and compiled == pytest.approx(uncompiled, rel=1e-5), kind


def test_kernels_do_not_count_as_settings_that_affect_weights():
    plain = load_recipe("demo")
    for key in ("compile", "liger"):
        assert settings_that_affect_weights(
            load_recipe("demo", {f"training.{key}": True})
        ) == settings_that_affect_weights(plain)


@pytest.fixture
def liger(monkeypatch) -> list:
    """Install a stand-in for Liger's package that supports only Llama; return the list of its calls."""
    patched = []
    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module._apply_liger_kernel_to_instance = lambda model, **options: patched.append((model, options))
    parent = types.ModuleType("liger_kernel.transformers")
    parent.monkey_patch = module
    for name, what in (
        ("liger_kernel", types.ModuleType("liger_kernel")),
        ("liger_kernel.transformers", parent),
        (module.__name__, module),
    ):
        monkeypatch.setitem(sys.modules, name, what)
    return patched


def test_liger_patches_the_llm_but_not_the_loss(liger):
    llm = tiny().llm
    use_liger(llm)
    assert liger == [(llm, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_a_family_that_liger_does_not_support_trains_without_it(liger, capsys):
    llm = tiny().llm
    llm.config.model_type = "unheard-of"
    use_liger(llm)
    assert liger == []
    assert (
        capsys.readouterr().out
        == "training.liger: Liger has no kernels for a model of type unheard-of; training without them\n"
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None,
    reason="needs a GPU and the package liger-kernel",
)
def test_ligers_kernels_compute_the_same():
    plain, fused = tiny().cuda(), tiny().cuda()
    use_liger(fused.llm)
    for ours, theirs in zip(
        step(fused, pack(rows(4, 9)).to("cuda")), step(plain, pack(rows(4, 9)).to("cuda")), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
