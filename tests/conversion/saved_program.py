"""A program that the tests run under torchrun: each engine trains for three steps, then saves its weights."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from slam_asr.artifacts.checkpoint import Checkpoint
from slam_asr.runtime.worker import leave_group
from slam_asr.training.checkpoint_writer import CheckpointWriter, take_snapshot
from slam_asr.training.engines.choose import start_process_group
from tests.training.engines_program import DEVICE, ENGINES, PRECISIONS, make, run


def main(folder: Path) -> None:
    start_process_group(DEVICE, "deepspeed")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for precision in PRECISIONS:
        for kind in ENGINES:
            engine = make(kind, precision)
            # A snapshot before the first update must succeed and change nothing.
            take_snapshot(engine, Checkpoint(0, 0, 0, kind, processes, {}), b"")
            run(engine, 0, 3)
            place = folder / f"{kind}-{precision}"
            writer = CheckpointWriter(str(place), folder, keep=1)
            writer.save(take_snapshot(engine, Checkpoint(3, 0, 3, kind, processes, {}), b""))
            writer.close()
            # Every process must request a sharded weight, and each gets the complete tensor.
            weights = {
                name: engine.get_state(name, "weight").detach().clone() for name in engine.groups.weights
            }
            if rank == 0:
                save_file(weights, place / "expected.safetensors")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
