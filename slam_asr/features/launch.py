"""An extraction by several processes of one machine, each with a GPU of its own."""

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
    """What one of the processes is told."""

    recipe: str
    """Resolved, as YAML."""
    files: list[str]
    """Manifests."""
    output: str
    """The store."""
    part: dict[str, int]
    """Of the extraction that they all belong to."""
    process: int = 0
    processes: int = 1
    folder: str = ""
    """Where it leaves a failure."""


def launch_extraction(job: ExtractionJob, processes: int) -> None:
    """Let each of several processes compute its share, and wait for all of them.

    Raises:
        UserError: with the sentence of the one that failed first; the others are ended.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with TemporaryDirectory(prefix="slam-asr-") as folder:
        running: list[subprocess.Popen] = []
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
            f"A process of the extraction ended with code {code}; its own message stands above. "
            "-9 is most often for want of memory: lower encoder.batch_seconds or features.processes."
        )
