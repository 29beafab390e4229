"""A program for torchrun: it takes the same steps with an LLM that is loaded completely or read lazily.

The folder that it gets contains LLMs. It writes losses.json, keyed by LLM, engine, tuning and way of loading
(`complete` or `sharded`).
"""

import dataclasses
import sys
from pathlib import Path

import torch

from slam_asr.config.recipe import Llm, Lora, Projector, Training
from slam_asr.models.answer_loss import allows_chunks, score_answers, score_in_chunks
from slam_asr.models.batch import Row, pack
from slam_asr.models.llm import checkpoint_layers, llm_width, load_llm, set_tuning
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import build_projector
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight, describe_lazy_llm
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.engines.engine import Engine
from slam_asr.training.engines.torch_engine import TorchEngine
from tests.ranks import leave_answer
from tests.training.engines_program import DEVICE

ENGINES = {"zero-3": {"zero_stage": 3}, "fsdp": {"engine": "fsdp"}}
STEPS, WIDTH = 4, 8


def build(
    folder: Path, complete: bool, kind: str, precision: str, tuning: Llm, checkpointing: bool = False
) -> Engine:
    """Create an engine with the LLM in a folder, which is loaded completely if `complete`, else lazily."""
    options = dataclasses.replace(Training(), precision=precision, **ENGINES[kind])
    lazy_weights: list[LazyWeight] = []
    if complete:
        llm = load_llm(folder, DTYPES[precision])
    else:
        llm, lazy_weights = describe_lazy_llm(folder, DTYPES[precision])
        assert (
            lazy_weights
            and all(p.is_meta for p in llm.parameters())
            and not any(b.is_meta for b in llm.buffers())
        )
    set_tuning(llm, tuning, seed=1)
    if checkpointing:
        checkpoint_layers(llm)
    return make_engine(
        Slam(build_projector(Projector(hidden=16), WIDTH, llm_width(llm), seed=2), llm),
        options,
        DEVICE,
        {},
        lazy_weights,
    )


def run(engine: Engine) -> list[float]:
    """Take a few steps, with different batches in each process, and return their losses."""
    rank, losses = torch.distributed.get_rank(), []
    assert engine.try_llm(allow_packing)
    if isinstance(engine, TorchEngine) and engine.try_llm(allows_chunks):
        engine.model.scorer = score_in_chunks
    engine.module.train()
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(2 * number + rank)
        audio = [torch.randn(n, WIDTH, generator=generator).to(DEVICE) for n in (10, 25)]
        batch = pack([Row(a, len(a) // 5, [], [3, 4, 5], [6 + number, 7, 1]) for a in audio]).to(DEVICE)
        output = engine.forward(batch, last=True)
        loss = output[0] if isinstance(output, tuple) else score_answers(output, batch.labels).loss
        engine.backward(loss, step_targets=12, last=True)
        assert engine.step(1e-3).applied
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / 12)
    return losses


TUNINGS = {
    "frozen": Llm(),
    "lora": Llm(tuning="lora", lora=Lora(targets=["q_proj", "down_proj"], dropout=0.1)),
    "full": Llm(tuning="full"),
}


def all_losses(folder: Path) -> dict[str, list[float]]:
    losses = {}
    for llm in sorted(path for path in folder.iterdir() if path.is_dir()):
        for kind in ENGINES:
            for tuned, tuning in TUNINGS.items():
                if tuned == "lora" and "gpt-2" in llm.name:
                    tuning = dataclasses.replace(tuning, lora=Lora(targets=["c_attn", "c_fc"]))
                for way in ("complete", "sharded"):
                    torch.manual_seed(torch.distributed.get_rank())  # for dropout
                    engine = build(
                        llm, way == "complete", kind, "fp32", tuning, checkpointing=tuned == "lora"
                    )
                    losses[f"{llm.name} {kind} {tuned} {way}"] = run(engine)
    return losses


def main(folder: Path) -> None:
    start_process_group(DEVICE, "deepspeed")
    leave_answer(folder, all_losses(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
