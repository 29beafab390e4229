"""An extraction by several processes on one machine, each with its own GPU."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from slam_asr.errors import UserError
from slam_asr.processes import FAILURE
from slam_asr.storage import write_json


@dataclass
class ExtractionJob:
    """The instructions for one of the processes, passed as a JSON file."""

    recipe: str
    """The resolved recipe, as YAML."""
    files: list[str]
    """Manifests."""
    output: str
    """The store."""
    work_shard: dict[str, int]
    """Fields of the `WorkShard` that all the processes compute together."""
    process: int = 0
    """Number of this process, from 0."""
    processes: int = 1
    folder: str = ""
    """Where the process writes the message of a failure."""


def launch_extraction(job: ExtractionJob, processes: int) -> None:
    """Divide the missing shards among several processes, and wait for all of them.

    Args:
        job: what all of them share.
        processes: how many.

    Raises:
        UserError: one of them failed; the others are terminated.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with TemporaryDirectory(prefix="slam-asr-") as folder:
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(processes):
                path = Path(folder) / f"job-{number}.json"
                write_json(path, asdict(replace(job, process=number, processes=processes, folder=folder)))
                command = [sys.executable, "-u", "-m", "slam_asr.features.encode", str(path)]
                running.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": threads}))
            while any(process.poll() is None for process in running) and not any(
                process.poll() for process in running
            ):
                time.sleep(0.1)
            code = next((process.returncode for process in running if process.returncode), 0)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        failure = Path(folder) / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text())
    if code:
        raise UserError(
            f"An extraction process ended with code {code}; see its own message above. "
            "Code -9 usually means that memory ran out: lower encoder.batch_seconds or features.processes."
        )
