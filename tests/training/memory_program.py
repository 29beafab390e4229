"""Run under torchrun by the tests: how much anonymous memory each process takes while an LLM is loaded and spread over them.

The folder's name is an engine and a way (`fsdp whole`), its `llm` the LLM. Leaves memory.json: each process' peak, as a share of the LLM's size.
A way has processes of its own, because those that have loaded one LLM keep memory for the next.
"""

import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - what it takes by itself is not counted
import torch

from slam_asr.processes import leave_group
from slam_asr.recipe import Llm
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
        engine = build(llm, way == "whole", kind, "bf16", Llm())
    shares: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, peak[0] / size)
    if torch.distributed.get_rank() == 0:
        (folder / "memory.json").write_text(json.dumps(shares))
    del engine
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
