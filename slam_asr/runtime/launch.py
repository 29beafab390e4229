"""Starts several processes on one machine that share a stage's work, each with its own GPU if there are GPUs.

Each process runs a module of this package, gets its job as a JSON file, and ends with the stage. When one
process fails, or when the stage is interrupted, the others are terminated.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from slam_asr import restart
from slam_asr.cores import thread_limits
from slam_asr.errors import UserError
from slam_asr.runtime.worker import FAILURE, PARENT, START
from slam_asr.storage import write_json

GRACE = 10.0
"""Seconds that a terminated process has before it is killed."""


@dataclass
class Job:
    """The instructions for one process. Modules derive classes from it, with fields of their own."""

    process: int = 0
    """Index of the process, from 0, and of its GPU, if it has one."""
    processes: int = 1
    """Number of processes that share the work."""
    folder: str = ""
    """Local folder in which the process writes the message of a failure."""


class ProcessEnded(Exception):
    """A process ended before its work was done. `processes_of` turns it into the message for the user."""


@contextlib.contextmanager
def processes_of(
    module: str, job: Job, count: int, remedy: str, piped: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes for the duration of a block.

    The block waits for their work: processes that still run when it ends are terminated. It raises
    `ProcessEnded` if one of them ends too early.

    Args:
        module: run as `python -m module JOB`, in a process that ends with this one.
        job: the fields that the processes have in common; each process gets its own index.
        count: how many processes to start.
        remedy: the options to lower if memory runs out, for the message about a process that was killed.
        piped: whether the block writes to their standard input and reads from their standard output.

    Yields:
        The running processes, in the order of their indices.

    Raises:
        UserError: a process failed. The message is the process's own if it left one.
        ProcessFailure: a process's GPU failed, which is usually temporary.
    """
    pipe = subprocess.PIPE if piped else None
    with TemporaryDirectory(prefix="slam-asr-") as folder:
        running: list[subprocess.Popen[str]] = []
        ended, code = False, 0
        try:
            for index in range(count):
                path = Path(folder) / f"job-{index}.json"
                write_json(path, asdict(replace(job, process=index, processes=count, folder=folder)))
                running.append(
                    subprocess.Popen(
                        # Unbuffered, so that the last lines of a process that is killed are not lost.
                        [sys.executable, "-u", "-m", START, module, str(path)],
                        env=os.environ | thread_limits(count) | {PARENT: str(os.getpid())},
                        stdin=pipe,
                        stdout=pipe,
                        encoding="utf-8",
                    )
                )
            try:
                yield running
            except ProcessEnded:
                ended = True
            # Read now, because the processes that are terminated below get a code too.
            code = next((process.returncode for process in running if process.poll()), 0)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:  # it waits for a GPU's driver, for example
                    process.kill()
                    process.wait()
        failure = Path(folder) / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text(encoding="utf-8"))
    if code == restart.EXIT_CODE:
        raise restart.ProcessFailure(f"The GPU of a process failed ({module}); see its own message above")
    if ended or code:
        raise UserError(
            f"A process of {module} ended with code {code}; see its own message above. "
            f"Code -9 usually means that memory ran out: lower {remedy}."
        )
