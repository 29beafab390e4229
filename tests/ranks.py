"""Runs test programs in several processes under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_ranks(program: str, number: int, folder: Path) -> Path:
    """Run a file in `number` processes, with the folder as its argument; it must succeed.

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
    """End such a program: the first process writes `losses.json`, and all wait for each other."""
    import torch

    from slam_asr.runtime.worker import leave_group

    if torch.distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(results))
    leave_group()
