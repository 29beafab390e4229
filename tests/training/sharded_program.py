"""Run under torchrun by the tests: the same steps with an LLM that each process loads whole, and with one that is read weight by weight.

The folder holds LLMs. Leaves losses.json, by LLM, engine, tuning and way.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from slam_asr.models.llm import checkpoint_layers, llm_width, load_llm, set_tuning
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import build_projector
from slam_asr.models.sharded import StoredWeight, describe_stored_llm
from slam_asr.models.slam import Row, Slam, pack
from slam_asr.recipe import Llm, Lora, Projector, Training
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.engines.engine import Engine
from slam_asr.training.engines.torch_engine import TorchEngine
from slam_asr.training.objective import allows_chunks, score_answers, score_in_chunks
from tests.ranks import leave_answer
from tests.training.engines_program import DEVICE

ENGINES = {"zero-3": {"zero_stage": 3}, "fsdp": {"engine": "fsdp"}}
STEPS, WIDTH = 4, 8


def build(folder: Path, whole: bool, kind: str, precision: str, tuning: Llm, again: bool = False) -> Engine:
    """An engine with an LLM."""
    options = dataclasses.replace(Training(), precision=precision, **ENGINES[kind])
    stored: list[StoredWeight] = []
    if whole:
        llm = load_llm(folder, DTYPES[precision])
    else:
        llm, stored = describe_stored_llm(folder, DTYPES[precision])
        assert (
            stored and all(p.is_meta for p in llm.parameters()) and not any(b.is_meta for b in llm.buffers())
        )
    set_tuning(llm, tuning, seed=1)
    if again:
        checkpoint_layers(llm)
    return make_engine(
        Slam(build_projector(Projector(hidden=16), WIDTH, llm_width(llm), seed=2), llm),
        options,
        DEVICE,
        {},
        stored,
    )


def run(engine: Engine) -> list[float]:
    """The losses of a few steps; the processes have batches of their own."""
    rank, losses = torch.distributed.get_rank(), []
    assert engine.try_llm(allow_packing)
    if isinstance(engine, TorchEngine) and engine.try_llm(allows_chunks):
        engine.bare.scorer = score_in_chunks
    engine.module.train()
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(2 * number + rank)
        audio = [torch.randn(n, WIDTH, generator=generator).to(DEVICE) for n in (10, 25)]
        batch = pack([Row(a, len(a) // 5, [], [3, 4, 5], [6 + number, 7, 1]) for a in audio]).to(DEVICE)
        output = engine.forward(batch, last=True)
        loss = output[0] if isinstance(output, tuple) else score_answers(output, batch.labels).loss
        engine.backward(loss, targets_of_step=12, last=True)
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
    found = {}
    for llm in sorted(path for path in folder.iterdir() if path.is_dir()):
        for kind in ENGINES:
            for tuned, tuning in TUNINGS.items():
                if tuned == "lora" and "gpt-2" in llm.name:
                    tuning = dataclasses.replace(tuning, lora=Lora(targets=["c_attn", "c_fc"]))
                for way in ("whole", "sharded"):
                    torch.manual_seed(torch.distributed.get_rank())  # of dropout
                    engine = build(llm, way == "whole", kind, "fp32", tuning, again=tuned == "lora")
                    found[f"{llm.name} {kind} {tuned} {way}"] = run(engine)
    return found


def main(folder: Path) -> None:
    start_process_group(DEVICE, "deepspeed")
    losses = all_losses(folder)
    leave_answer(folder, losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
