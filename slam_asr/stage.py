"""What all stages share: an output folder that is complete or does not count.

A stage writes its results into a folder and, last of all, `stage.json`: the digest of everything
that went in, what came out, and how long it took. Run again with the same inputs, a stage finds
that record and does nothing; killed half-way, there is no record and the work is done again. In an
output path, `{fingerprint}` stands for the digest of the inputs, so that one store can hold the
results of many recipes.

Between the steps of a pipeline travels a pointer: a small JSON file {uri, sha256, bytes} that names
such a folder. The next program opens the folder itself.

A folder may lie in object storage. The work is done on local disk then and published when it is
finished, the record last.
"""

import contextlib
import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slam_asr import __version__
from slam_asr.errors import UserError
from slam_asr.progress import clock, log_line
from slam_asr.storage import (
    delete,
    digest,
    exists,
    fetch,
    is_s3,
    join,
    local_path,
    publish_folder,
    read_bytes,
    sha256_of_bytes,
    walk,
    write_bytes,
    write_json,
)
from slam_asr.storage.cache import cache_folder

RECORD = "stage.json"
FINGERPRINT = "{fingerprint}"


@dataclass
class Outcome:
    """What a stage's work came to."""

    summary: str
    """One line for people: what came out."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers for the dashboard."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What later stages or the report want to know of this one."""


@dataclass
class Record(Outcome):
    """A finished stage, as `stage.json` keeps it."""

    stage: str = ""
    folder: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Wall time of the run that did the work."""
    finished: float = 0.0
    """Unix time at its end, by the clock of the machine that did it."""
    version: str = __version__

    def file(self, name: str) -> Path:
        """A file of the stage's folder on local disk; it is fetched from object storage first."""
        return fetch(join(self.folder, name))


def run_stage(
    stage: str,
    output: str,
    inputs: dict[str, Any],
    work: Callable[[Path], Outcome],
    overwrite: bool = False,
    intact: Callable[[Record], bool] = lambda record: True,
) -> Record:
    """Do a stage's work once for the same inputs.

    Args:
        stage: the stage's name, as on the command line.
        output: the folder; `{fingerprint}` in it is replaced.
        inputs: everything that the result depends on, JSON-able.
        work: called with the folder; writes the results there.
        overwrite: replace results of other inputs instead of refusing.
        intact: whether what a record vouches for is still there, where that lies outside of its folder.

    Raises:
        UserError: the folder holds results of other inputs.
    """
    output = output.replace(FINGERPRINT, digest(inputs)[:16])
    remote = is_s3(output)
    folder = output.rstrip("/") if remote else str(local_path(output).absolute())
    place = cache_folder() / "work" / digest(folder)[:24] if remote else Path(folder)
    # What was left half-done with other inputs is never published with these.
    bench = place / digest(inputs)[:24] if remote else place
    with _alone_in(place):
        done = read_record(folder)
        if done is not None and done.inputs == inputs and intact(done):
            log_line(f"{stage}: already there, nothing to do: {done.summary} ({folder})")
            return done
        if done is not None and done.inputs != inputs:
            require_way(folder, done, inputs, overwrite)
            delete(join(folder, RECORD))
        bench.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        outcome = work(bench)
        seconds = round(time.monotonic() - started, 3)
        record = Record(
            **vars(outcome), stage=stage, folder=folder, inputs=inputs, seconds=seconds, finished=time.time()
        )
        write_json(bench / RECORD, asdict(record))
        if remote:
            log_line(f"{stage}: uploading to {folder}")
            publish_folder(bench, folder, last=RECORD)
            shutil.rmtree(place)
    log_line(f"{stage}: {record.summary} in {clock(record.seconds)} ({folder})")
    return record


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; a second one waits, and then most often finds the work done.

    The lock ends with the process that holds it, however that ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log_line(f"waiting for another process that works in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def require_way(folder: str, done: Record, inputs: dict[str, Any], overwrite: bool) -> None:
    """Refuse results of other inputs, unless the user gave them up.

    Raises:
        UserError: the folder holds results of other inputs.
    """
    if not overwrite:
        changed = sorted(k for k in inputs | done.inputs if inputs.get(k) != done.inputs.get(k))
        raise UserError(
            f"{folder} holds the results of {done.stage} with other inputs "
            f"(changed: {', '.join(changed)}): choose another --output or add --overwrite true."
        )


def read_record(folder: str | Path) -> Record | None:
    """The record of a finished stage, or None where the folder is missing or half-done."""
    path = join(folder, RECORD)
    if not exists(path):
        return None
    try:
        record = Record(**json.loads(read_bytes(path)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a stage's record: remove that folder and run the stage again."
        ) from error
    record.folder = str(folder).rstrip("/") if is_s3(folder) else str(local_path(folder))
    return record


def require_record(folder: str | Path, stage: str) -> Record:
    """The record of a finished `stage`.

    Raises:
        UserError: there is none, or it is another stage's.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{folder} holds no finished {stage}: run `slam-asr {stage}` first, or check the path."
        )
    if record.stage != stage:
        raise UserError(
            f"{folder} was written by {record.stage}, not by {stage}: give the folder of {stage}."
        )
    return record


def write_pointer(record: Record, path: str | Path) -> None:
    """Write the small artifact that names a stage's folder to the next step."""
    pointer = {
        "uri": record.folder,
        "sha256": sha256_of_bytes(read_bytes(join(record.folder, RECORD))),
        "bytes": sum(f.bytes for f in walk(record.folder)),
        "stage": record.stage,
        "summary": record.summary,
    }
    write_bytes(path, json.dumps(pointer, indent=2, ensure_ascii=False) + "\n")


def log_metrics(record: Record, log: Callable[[str, Any], None]) -> None:
    """Hand a stage's metrics to a dashboard's logger; a number that is not finite goes as text, which is all it can keep."""
    for name, value in record.metrics.items():
        log(name, value if math.isfinite(value) else str(value))


def follow_pointer(path: str | Path) -> str:
    """The folder that a pointer names, after checking that it still holds what it held.

    Raises:
        UserError: the folder is gone or its record is another one now.
    """
    try:
        pointer = json.loads(read_bytes(path))
        folder, expected = pointer["uri"], pointer["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a pointer to a stage's folder ({type(error).__name__}): run the step before again."
        ) from error
    record = join(folder, RECORD)
    if not exists(record) or sha256_of_bytes(read_bytes(record)) != expected:
        raise UserError(
            f"{folder}, named by {path}, is gone or was replaced since: run the step before again."
        )
    return folder


def follow_parts(paths: Iterable[str]) -> str:
    """The folder of the first of several parts that lie in one store, after checking each pointer.

    Raises:
        UserError: a folder is gone or its record is another one now.
    """
    first, *_ = [follow_pointer(path) for path in paths]
    return first
