"""Starts several processes on one machine that share a stage's work, each with its own GPU if there are GPUs.

Each process runs a module of this package, gets its job as a JSON file, and ends when the stage ends. When
one process fails, or the stage is interrupted, all other processes are terminated.
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
"""Seconds that a process has to end after SIGTERM, before it is killed."""


@dataclass
class Job:
    """The instructions for one process. Modules add fields in classes derived from this one."""

    process: int = 0
    """Index of the process, from 0, and of its GPU, if it has one."""
    processes: int = 1
    """Number of processes that share the work."""
    folder: str = ""
    """Local folder to which the process writes the message of a failure."""


class ProcessEnded(Exception):
    """A process ended before its work was done.

    `processes_of` turns this exception into a `UserError` or, after a failure of the GPU, a `ProcessFailure`.
    """


@contextlib.contextmanager
def processes_of(
    module: str, job: Job, count: int, remedy: str, piped: bool = False
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes for the duration of a block.

    The block must wait until the processes are done, because those that still run at its end are terminated.
    It may raise `ProcessEnded` if a process ends too early.

    Args:
        module: module that each process runs with the path of its job as the only argument.
        job: the fields that the jobs of all processes have in common.
        count: number of processes to start.
        remedy: the options to lower if memory runs out, for the message about a process that was killed.
        piped: whether standard input and standard output of the processes are pipes for the block.

    Yields:
        The running processes, in the order of their indices.

    Raises:
        UserError: a process failed. The message is the process's own if it left one.
        ProcessFailure: a process's GPU failed, which is usually temporary.
    """
    with TemporaryDirectory(prefix="slam-asr-") as folder:
        running: list[subprocess.Popen[str]] = []
        ended, code = False, 0
        try:
            for index in range(count):
                own_job = replace(job, process=index, processes=count, folder=folder)
                running.append(_start(module, own_job, piped))
            try:
                yield running
            except ProcessEnded:
                ended = True
            # Read here, because the processes that are terminated below also get an exit code.
            code = next((process.returncode for process in running if process.poll()), 0)
        finally:
            _terminate(running)
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


def _start(module: str, job: Job, piped: bool) -> subprocess.Popen[str]:
    path = Path(job.folder) / f"job-{job.process}.json"
    write_json(path, asdict(job))
    pipe = subprocess.PIPE if piped else None
    return subprocess.Popen(
        # Output is unbuffered (-u), so that the last lines of a process that is killed are not lost.
        [sys.executable, "-u", "-m", START, module, str(path)],
        env=os.environ | thread_limits(job.processes) | {PARENT: str(os.getpid())},
        stdin=pipe,
        stdout=pipe,
        encoding="utf-8",
    )


def _terminate(running: list[subprocess.Popen[str]]) -> None:
    """Terminate processes, and kill those that have not ended after `GRACE` seconds each."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:  # a process may wait for a GPU's driver, for example
            process.kill()
            process.wait()
