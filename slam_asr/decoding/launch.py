"""Decoding by several processes of one machine, each with a GPU of its own."""

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
    """What one of the processes is told at first."""

    recipe: str
    """Resolved, as YAML."""
    model: str
    """Its folder, on local disk."""
    files: list[str]
    """Manifests."""
    feature_store: str | None
    process: int
    folder: str
    """Where it leaves a failure."""


class _Ended(Exception):
    """A process has ended before its work was done."""


def launch_decoding(
    decoder: "Decoder", batches: list[list[int]], processes: int, take: "Callable[[dict[int, Answer]], None]"
) -> None:
    """Give each of several processes one batch after the other, until there is none left.

    Args:
        decoder: whose utterances they are; it decodes none itself.
        batches: to decode.
        processes: how many.
        take: is given each batch's answers, one at a time.

    Raises:
        UserError: with the sentence of the one that failed first; the others are ended.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    left, one_at_a_time = iter(batches), threading.Lock()
    with (
        TemporaryDirectory(prefix="slam-asr-") as folder,
        ThreadPoolExecutor(processes, "give-batches") as giving,
    ):
        running: list[subprocess.Popen] = []
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
            done = [giving.submit(_serve, process, left, take, one_at_a_time) for process in running]
            failed = any(future.exception() for future in wait(done, return_when=FIRST_EXCEPTION).done)
            code = next((process.wait() for process in running if failed and process.poll()), 0)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        failure = Path(folder) / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text())
        if failed:
            error = next(e for future in done if (e := future.exception()))
            if not isinstance(error, _Ended):
                raise error
            raise UserError(
                f"A process of the decoding ended with code {code}; its own message stands above. "
                "-9 is most often for want of memory: lower decoding.positions_per_batch or decoding.processes."
            )


def _serve(
    process: subprocess.Popen,
    batches: Iterator[list[int]],
    take: "Callable[[dict[int, Answer]], None]",
    one_at_a_time: threading.Lock,
) -> None:
    """Give a process batches, and pass on its answers."""
    from slam_asr.decoding.journal import answers_in

    while True:
        with one_at_a_time:
            batch = next(batches, None)
        if batch is None:
            return
        try:
            process.stdin.write(json.dumps(batch) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError as error:
            raise _Ended from error
        if not line.endswith("\n"):
            process.wait()
            raise _Ended
        with one_at_a_time:
            take(answers_in(json.loads(line)))
