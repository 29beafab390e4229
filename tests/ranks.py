"""Runs programs of the tests under torchrun, and functions in forked processes."""

import atexit
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_on_ranks(program: str, number: int, folder: Path) -> Path:
    """Run a program in `number` processes, with the folder as its argument; it must succeed.

    Returns:
        The folder.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(number),
            program,
            str(folder),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def leave_answer(folder: Path, results: Any) -> None:
    """End a program of `run_on_ranks`: rank 0 writes `losses.json`, and all ranks wait for each other."""
    import torch

    from slam_asr.runtime.worker import leave_group

    if torch.distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(results))
    leave_group()


def fork(*functions: Callable[[], None]) -> list[int]:
    """Call each function in its own process, which is forked from the test's process and so starts at once.

    Returns:
        The exit codes; -9 for a process that had not ended after a minute.
    """

    def run(function: Callable[[], None]) -> None:
        atexit._clear()  # the exit handlers of the test's process
        function()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(function,)) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def fork_ranks(number: int, folder: Path, function: Callable[[int], None]) -> list[int]:
    """Call a function with each rank, in forked processes that form a process group of gloo; see `fork`."""
    import torch

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=number
        )
        function(rank)

    return fork(*(functools.partial(run, rank) for rank in range(number)))
