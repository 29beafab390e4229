"""Decoding by several processes on one machine, each with a GPU of its own.

The processes run `python -m slam_asr.decoding.decoder`. They read batches from standard input and write
answers to standard output, one JSON line each, so every process gets its next batch when it is done with the
last one.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from slam_asr.errors import UserError
from slam_asr.processes import FAILURE
from slam_asr.recipe import dump_recipe
from slam_asr.storage import write_json

if TYPE_CHECKING:
    from slam_asr.decoding.decoder import Decoder
    from slam_asr.models.search import Answer


@dataclass
class DecodingJob:
    """The job file of one process."""

    recipe: str
    """The resolved recipe, as YAML."""
    model: str
    """The model's folder on local disk."""
    files: list[str]
    """Manifests."""
    feature_store: str | None
    process: int
    """Number of the process, and of its GPU."""
    folder: str
    """Where the process writes the message of a failure."""


class _ProcessEnded(Exception):
    """A process ended before its work was done."""


def launch_decoding(
    decoder: "Decoder", batches: list[list[int]], processes: int, take: "Callable[[dict[int, Answer]], None]"
) -> None:
    """Decode batches on several processes.

    Args:
        decoder: holds recipe, model and utterances; it decodes nothing itself.
        batches: indices of each batch's utterances.
        processes: number of processes.
        take: called with each batch's answers, never by two threads at once.

    Raises:
        UserError: with the message of the process that failed first; the others are terminated.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    remaining, lock = iter(batches), threading.Lock()
    with (
        TemporaryDirectory(prefix="slam-asr-") as folder,
        ThreadPoolExecutor(processes, "give-batches") as pool,
    ):
        running: list[subprocess.Popen[str]] = []
        try:
            for number in range(processes):
                path = Path(folder) / f"job-{number}.json"
                job = DecodingJob(
                    dump_recipe(decoder.recipe),
                    str(decoder.model.folder),
                    decoder.files,
                    decoder.feature_store,
                    number,
                    folder,
                )
                write_json(path, asdict(job))
                command = [sys.executable, "-u", "-m", "slam_asr.decoding.decoder", str(path)]
                running.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | {"OMP_NUM_THREADS": threads},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        encoding="utf-8",
                    )
                )
            futures = [pool.submit(_serve, process, remaining, take, lock) for process in running]
            failed = any(future.exception() for future in wait(futures, return_when=FIRST_EXCEPTION).done)
            code = next((process.wait() for process in running if failed and process.poll()), 0)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        failure = Path(folder) / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text())
        if failed:
            error = next(e for future in futures if (e := future.exception()))
            if not isinstance(error, _ProcessEnded):
                raise error
            raise UserError(
                f"A decoding process ended with code {code}; see its own message above. -9 usually means "
                "that memory ran out: lower decoding.positions_per_batch or decoding.processes."
            )


def _serve(
    process: subprocess.Popen[str],
    batches: Iterator[list[int]],
    take: "Callable[[dict[int, Answer]], None]",
    lock: threading.Lock,
) -> None:
    """Send batches to a process and pass its answers on, until no batch is left.

    Raises:
        _ProcessEnded: the process ended early.
    """
    from slam_asr.decoding.journal import answers_in

    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    while True:
        with lock:
            batch = next(batches, None)
        if batch is None:
            return
        try:
            process.stdin.write(json.dumps(batch) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError as error:
            raise _ProcessEnded from error
        if not line.endswith("\n"):
            process.wait()
            raise _ProcessEnded
        with lock:
            take(answers_in(json.loads(line)))
