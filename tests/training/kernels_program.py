"""A program for torchrun: it trains a small LLM with adapters under each engine.

It writes losses.json, which contains for each engine the losses without and with compiled layers.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slam_asr.config.recipe import Llm, Lora, Projector, Training
from slam_asr.models.answer_loss import score_in_chunks
from slam_asr.models.batch import Row, pack
from slam_asr.models.llm import checkpoint_layers, set_tuning
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.projector import build_projector
from slam_asr.models.slam import Slam
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.kernels import compile_layers
from tests.ranks import leave_answer

DEVICE = torch.device("cpu")
ENGINES = {
    "zero-2": {"zero_stage": 2},
    "zero-2-checkpointing": {"zero_stage": 2, "gradient_checkpointing": True},
    "ddp": {"engine": "ddp"},
    "ddp-checkpointing": {"engine": "ddp", "gradient_checkpointing": True},
    "fsdp": {"engine": "fsdp"},
}
if os.environ.get("SLAM_ASR_SOAK"):
    ENGINES |= {"zero-0": {"zero_stage": 0}, "zero-1": {"zero_stage": 1}}


def losses(compiled: bool, **options) -> list[float]:
    """Return the losses of four steps, each with a different number of utterances."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    set_tuning(llm, Llm(tuning="lora", lora=Lora(dropout=0.0)), seed=0)
    assert allow_packing(llm)
    if options.get("gradient_checkpointing"):
        checkpoint_layers(llm)
    if compiled:
        compile_layers(llm)
    model = Slam(build_projector(Projector(hidden=8), 16, 32, 0), llm)
    model.scorer = score_in_chunks
    engine = make_engine(model, dataclasses.replace(Training(), precision="fp32", **options), DEVICE, {})
    engine.module.train()
    losses_by_step = []
    for number in range(4):
        generator = torch.Generator().manual_seed(2 * number + torch.distributed.get_rank())
        rows = [
            Row(torch.randn(5 * n, 16, generator=generator), n, [], [3, 4], [5 + n, 7, 1])
            for n in range(2, 4 + number)
        ]
        loss, sums = engine.forward(pack(rows), last=True)
        engine.backward(loss, 2 * int(sums[2]), last=True)
        engine.step(1e-2)
        total = loss.detach() / sums[2]
        torch.distributed.all_reduce(total)
        losses_by_step.append(float(total))
    return losses_by_step


def main(folder: Path) -> None:
    start_process_group(DEVICE, "deepspeed")
    # Engines interact only with the traced layer, so no code needs to be generated from it here.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    results = {
        kind: [losses(compiled, **options) for compiled in (False, True)] for kind, options in ENGINES.items()
    }
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    leave_answer(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
