"""Run under torchrun by the tests: trains a small model under every ZeRO stage and precision.

Leaves, for each, the checkpoint that our engine writes and the engine's own fp32 weights.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from slam_asr.recipe import Training
from slam_asr.training import checkpoint
from slam_asr.training.engine import DeepSpeedEngine, start_process_group

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")


class Model(torch.nn.Module):
    """Odd sizes, so that no slice comes out even; a frozen part, which no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
        self.llm = torch.nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.llm(self.projector(x.to(self.llm.weight.dtype)))


def main(folder: Path) -> None:
    device = torch.device("cpu")
    start_process_group(device)
    from deepspeed.utils import safe_get_full_fp32_param

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(1)
    inputs, wanted = torch.randn(8, 10, generator=generator), torch.randn(8, 3, generator=generator)
    for stage in STAGES:
        for precision in PRECISIONS:
            model = Model()
            options = dataclasses.replace(Training(), zero_stage=stage, precision=precision, gradient_clipping=1.0)
            engine = DeepSpeedEngine(model, options, device)
            losses = []
            for _ in range(3):
                total = torch.zeros(())
                # Two micro-batches a process, of unequal sizes.
                mine = torch.arange(8)[rank::ranks]
                for part in (mine[:1], mine[1:]):
                    loss = ((engine.engine(inputs[part]).float() - wanted[part]) ** 2).sum()
                    engine.backward(loss, targets_of_step=8, last=len(part) > 1)
                    engine.step(1e-2)
                    total += loss.detach()
                torch.distributed.all_reduce(total)
                losses.append(total / 8)
            target = folder / f"{stage}-{precision}"
            engine.save(target, "global_step3", {"step": 3})
            weights = {
                # Stage 0 in fp32 has no masters: the weights themselves are.
                n: p.detach().clone() if stage == 0 and precision == "fp32" else _master(engine, n, p, safe_get_full_fp32_param)
                for n, p in model.named_parameters() if p.requires_grad
            }
            torch.distributed.barrier()
            if rank == 0:
                checkpoint.publish(target, "global_step3")
                save_file({**weights, "losses": torch.stack(losses)}, target / "expected.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _master(engine: DeepSpeedEngine, name: str, parameter: torch.nn.Parameter, read) -> torch.Tensor:
    optimizer = engine.engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        position = [id(p) for group in optimizer.fp16_groups for p in group].index(id(parameter))
        return [p for group in optimizer.fp32_groups for p in group][position].detach().clone()
    return read(parameter).clone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
