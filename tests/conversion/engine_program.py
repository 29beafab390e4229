"""A program that the tests run under torchrun: it trains a small model with every ZeRO stage.

It does so in fp32 and in bf16, and each time writes DeepSpeed's own checkpoint and the engine's fp32 weights.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from slam_asr.config.recipe import Training
from slam_asr.runtime.worker import leave_group
from slam_asr.training.engines.choose import start_process_group
from slam_asr.training.engines.deepspeed_engine import DeepSpeedEngine

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")


class Model(torch.nn.Module):
    """A model with 117 trained weights, which ranks cannot share equally, and a frozen part.

    No checkpoint has the frozen part.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
        self.llm = torch.nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.llm(self.projector(x.to(self.llm.weight.dtype)))


def main(folder: Path) -> None:
    device = torch.device("cpu")
    start_process_group(device, "deepspeed")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(1)
    inputs, expected = torch.randn(8, 10, generator=generator), torch.randn(8, 3, generator=generator)
    for stage in STAGES:
        for precision in PRECISIONS:
            model = Model()
            options = dataclasses.replace(
                Training(), zero_stage=stage, precision=precision, gradient_clipping=1.0
            )
            engine = DeepSpeedEngine(model, options, device)
            losses = []
            for _ in range(3):
                total = torch.zeros(())
                # Two micro-batches of unequal sizes per process.
                mine = torch.arange(8)[rank::ranks]
                for last, part in ((False, mine[:1]), (True, mine[1:])):
                    loss = ((engine.module(inputs[part]).float() - expected[part]) ** 2).sum()
                    engine.backward(loss, step_targets=8, last=last)
                    total += loss.detach()
                engine.step(1e-2)
                torch.distributed.all_reduce(total)
                losses.append(total / 8)
            target = folder / f"{stage}-{precision}"
            engine.module.save_checkpoint(
                str(target),
                tag="global_step3",
                client_state={
                    "trained_weights": [[n for n, _ in part] for part in engine.groups.parts.values()]
                },
                save_latest=False,
                exclude_frozen_parameters=True,
            )
            weights = {
                # The fp32 master copy. Stage 0 in fp32 has none: it trains the model's weights directly.
                name: engine.get_state(name, "weight").detach().clone()
                for name in engine.groups.weights
            }
            torch.distributed.barrier()
            if rank == 0:
                save_file({**weights, "losses": torch.stack(losses)}, target / "expected.safetensors")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
