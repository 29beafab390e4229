"""A program for torchrun: it measures the memory that each process takes while an LLM is loaded and sharded.

The name of the folder that it gets consists of an engine and a way of loading, such as `fsdp complete`. The
folder contains the LLM as `llm`. The program writes memory.json: the peak of each process's anonymous memory,
as a fraction of the LLM's size. Each way of loading needs new processes, because a process that has loaded
one LLM reuses the memory for the next.
"""

import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - imported first, so that its own memory is not counted
import torch

from slam_asr.config.recipe import Llm
from slam_asr.runtime.worker import leave_group
from slam_asr.training.engines.choose import start_process_group
from tests.memory import peak_of_anonymous_memory
from tests.training.engines_program import DEVICE
from tests.training.sharded_program import build


def main(folder: Path) -> None:
    start_process_group(DEVICE, "deepspeed")
    kind, way = folder.name.split()
    llm = folder / "llm"
    size = sum(path.stat().st_size for path in llm.glob("*.safetensors"))
    with peak_of_anonymous_memory() as peak:
        engine = build(llm, way == "complete", kind, "bf16", Llm())
    shares: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, peak[0] / size)
    if torch.distributed.get_rank() == 0:
        (folder / "memory.json").write_text(json.dumps(shares))
    del engine
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
