"""A program for torchrun: it takes the same steps with every engine, with and without a restart.

It also runs each engine with a gradient that is not finite. It writes losses.json, which contains for each
engine and precision:

- the losses of an uninterrupted run, of a run resumed from a saved state in a new engine of the same kind,
  and of a run resumed in an engine of another kind;
- the number of updates before the restart;
- whether the gradient that is not finite left the weights unchanged, and the loss of the step after it.
"""

import copy
import dataclasses
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slam_asr.config.recipe import Training
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.engines.engine import Engine
from tests.ranks import leave_answer

STEPS, HALF = 20, 10
DEVICE = (
    torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
)
ENGINES = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "zero-1-offload": {"zero_stage": 1, "offload_optimizer": True},
    "zero-2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero-3-offload": {"zero_stage": 3, "offload_optimizer": True},
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
}
PRECISIONS = ("fp32", "bf16", "fp16") if torch.cuda.is_available() else ("fp32", "bf16")


class Model(torch.nn.Module):
    """A model with a frozen layer and two trained parts, whose learning rates differ.

    Most of its sizes are odd, so that slices are unequal.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
        self.llm = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        self.llm[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.llm(self.projector(x.to(self.llm[2].weight.dtype)))


def make(kind: str, precision: str) -> Engine:
    options = dataclasses.replace(
        Training(), precision=precision, gradient_clipping=0.5, weight_decay=0.01, **ENGINES[kind]
    )
    return make_engine(Model(), options, DEVICE, {"llm": 3e-5})


def run(engine: Engine, first: int, last: int, poison: int | None = None) -> list[float]:
    """Take the steps from `first` to `last` - 1. In step `poison`, an input of the last process is NaN.

    Returns:
        The loss of each step.
    """
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        inputs, targets = torch.randn(8, 10, generator=generator), torch.randn(8, 3, generator=generator)
        if number == poison:
            inputs[-1, 0] = torch.nan
        total = torch.zeros((), device=DEVICE)
        mine = torch.arange(8)[rank::processes]
        # Two micro-batches, of which the second is larger.
        for is_last, part in ((False, mine[:1]), (True, mine[1:])):
            outputs = engine.forward(inputs[part].to(DEVICE), is_last).float()
            loss = ((outputs - targets[part].to(DEVICE)) ** 2).sum()
            engine.backward(loss, step_targets=8, last=is_last)
            total += loss.detach()
        update = engine.step(1e-2 * (1 - number / 40))
        assert update.applied == (number != poison), (number, update)
        assert update.gradient_norm is None or update.gradient_norm > 0
        torch.distributed.all_reduce(total)
        losses.append(float(total) / 8)
    return losses


def save(engine: Engine, folder: Path) -> None:
    share = {f"{which}/{name}": tensor for name, which, tensor in engine.state_to_save()}
    save_file(share, folder / f"{torch.distributed.get_rank()}.safetensors")
    torch.distributed.barrier()


def load(engine: Engine, folder: Path, updates: int, scale: dict[str, float]) -> Engine:
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            which, name = key.split("/", 1)
            engine.set_state(name, which, tensor)
    engine.finish_restoring(updates)
    engine.set_loss_scale(scale)
    torch.distributed.barrier()
    return engine


def main(folder: Path) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    start_process_group(DEVICE, "deepspeed")
    results: dict[str, dict] = {}
    for precision in PRECISIONS:
        for i, kind in enumerate(ENGINES):
            engine = make(kind, precision)
            uninterrupted = run(engine, 0, HALF)
            state_folder = folder / f"{kind}-{precision}"
            state_folder.mkdir(exist_ok=True)
            save(engine, state_folder)
            updates, scale = engine.updates(), copy.deepcopy(engine.loss_scale())
            uninterrupted += run(engine, HALF, STEPS)
            same_kind = load(make(kind, precision), state_folder, updates, scale)
            other_kind = load(make(list(ENGINES)[i - 1], precision), state_folder, updates, scale)
            poisoned = load(make(kind, precision), state_folder, updates, scale)
            before = {name: poisoned.get_state(name, "weight").clone() for name in poisoned.groups.weights}
            run(poisoned, HALF, HALF + 1, poison=HALF)
            unchanged = all(torch.equal(before[name], poisoned.get_state(name, "weight")) for name in before)
            results[f"{kind} {precision}"] = {
                "uninterrupted": uninterrupted,
                "same kind": run(same_kind, HALF, STEPS),
                "other kind": run(other_kind, HALF, STEPS),
                "updates": updates,
                "unchanged": unchanged,
                "after": run(poisoned, HALF + 1, HALF + 2),
            }
    leave_answer(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
