"""The output folder of a stage, which is either complete or ignored.

A stage writes its results into a folder and, last of all, `stage.json`: a record of the stage's inputs, its
results and its run time. A stage that runs again with the same inputs finds this record and does nothing. A
stage that is killed leaves no record. Its next start does the work again, or resumes it if the stage has
saved its progress. In an output path, `{fingerprint}` is replaced by the digest of the inputs, so one store
can hold the results of many recipes.

A step of a pipeline passes its folder to the next step as a pointer: a small JSON file with the folder's
address (`uri`) and size, and the SHA-256 of its record. The next program opens the folder itself. The run's
recipe travels in the pointer, so that a step of a pipeline needs no input besides earlier results.

A folder may be in object storage. The work is then done on local disk and uploaded when it is finished, with
the record as the last file.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slam_asr import __version__
from slam_asr.artifacts.run_records import StepRecord, save_step
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.cores import usable_cores
from slam_asr.errors import ConfigurationError, InputError
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
    require_writable,
    sha256_of_bytes,
    walk,
    write_bytes,
    write_json,
)
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.locks import exclusive

RECORD = "stage.json"
FINGERPRINT = "{fingerprint}"


@dataclass
class Outcome:
    """The result of a stage's work."""

    summary: str
    """One line for people: what the stage produced."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers for the pipeline's dashboard."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Details that later stages or the report need."""
    gpus: int | None = 0
    """Number of GPUs that did the work. None only in records of earlier versions."""


@dataclass
class Record(Outcome):
    """The content of `stage.json`, which describes a finished stage."""

    stage: str = ""
    """Name of the stage, as on the command line."""
    folder: str = ""
    """Path or URI of the stage's folder."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Everything on which the results depend; see `run_stage`."""
    seconds: float = 0.0
    """Wall time of the work in seconds."""
    finished: float = 0.0
    """Unix time at which the work ended, by the clock of its machine."""
    version: str = __version__
    """Version of slam-asr that did the work."""
    cores: int | None = None
    """Number of CPU cores that were usable; None in records of earlier versions."""
    reused: bool = field(default=False, compare=False)
    """Whether this call of `run_stage` found the result instead of computing it. It is not saved."""

    def file(self, name: str) -> Path:
        """Return the local path of a file in the stage's folder, fetching it if it is in object storage."""
        return fetch(join(self.folder, name))


def result_folder(output: str, inputs: dict[str, Any]) -> str:
    """Return the address of a stage's folder: an absolute path or URI, with `{fingerprint}` replaced."""
    folder = output.replace(FINGERPRINT, digest(inputs)[:16])
    return folder.rstrip("/") if is_s3(folder) else str(local_path(folder).absolute())


def run_stage(
    stage: str,
    output: str,
    inputs: dict[str, Any],
    work: Callable[[Path], Outcome],
    overwrite: bool = False,
    intact: Callable[[Record], bool] = lambda record: True,
) -> Record:
    """Do a stage's work, unless it was already done with the same inputs.

    Args:
        stage: the stage's name, as on the command line.
        output: the output folder; `{fingerprint}` in it is replaced by the digest of the inputs.
        inputs: everything on which the result depends. It must be JSON-serialisable.
        work: a function that writes the results into the local folder that it is given.
        overwrite: whether to replace results of other inputs instead of refusing.
        intact: a function that returns whether the results of a record still exist, for stages with results
            outside the folder.

    Returns:
        The record of this work or, if it was already done with the same inputs, of the earlier work.

    Raises:
        ConfigurationError: the folder holds results of other inputs, and `overwrite` is false.
        InputError: the folder's `stage.json` is damaged.
        OSError: the local folder cannot be written.
        StorageError: the bucket cannot be written. A small file is written as a test before the work begins.
    """
    folder = result_folder(output, inputs)
    remote = is_s3(folder)
    locked_folder = cache_folder() / "work" / digest(folder)[:24] if remote else Path(folder)
    # If the output is in object storage, each set of inputs has its own work folder. An unfinished run with
    # other inputs may have left files, which must not be uploaded with these results.
    work_folder = locked_folder / digest(inputs)[:24] if remote else locked_folder
    locked_folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locked_folder.parent / f".{locked_folder.name}.lock"
    # A second process waits, and then usually finds that the work is done. The kernel releases the lock when
    # the process that holds it ends, for whatever reason.
    with exclusive(lock, f"waiting for another process that is working in {locked_folder}"):
        done = read_record(folder)
        if done is not None and done.inputs == inputs and intact(done):
            log_line(f"{stage}: already there, nothing to do: {done.summary} ({folder})")
            return replace(done, reused=True)
        _prepare(folder, done, inputs, overwrite)
        work_folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        outcome = work(work_folder)
        seconds = round(time.monotonic() - started, 3)
        record = Record(**vars(outcome), stage=stage, folder=folder, inputs=inputs, seconds=seconds)
        record.finished, record.cores = time.time(), usable_cores()
        write_json(work_folder / RECORD, {k: v for k, v in asdict(record).items() if k != "reused"})
        if remote:
            log_line(f"{stage}: uploading to {folder}")
            publish_folder(work_folder, folder, last=RECORD)
            # This also removes the work folders that interrupted attempts with other inputs have left.
            shutil.rmtree(locked_folder)
    log_line(f"{stage}: {record.summary} in {clock(record.seconds)} ({folder})")
    return record


def _prepare(folder: str, done: Record | None, inputs: dict[str, Any], overwrite: bool) -> None:
    """Check that the folder's results may be replaced and that it is writable; remove an outdated record."""
    replaces = done is not None and done.inputs != inputs
    if done is not None and replaces:
        require_permission_to_replace(folder, done, inputs, overwrite)
    require_writable(folder)
    if replaces:
        # Otherwise, an interruption of the work would leave the old record next to new results.
        delete(join(folder, RECORD))


def require_permission_to_replace(folder: str, done: Record, inputs: dict[str, Any], overwrite: bool) -> None:
    """Refuse to replace results of other inputs, unless `overwrite` is true.

    Raises:
        ConfigurationError: the folder holds results of other inputs and `overwrite` is false.
    """
    if not overwrite:
        changed = ", ".join(different_inputs(inputs, done.inputs))
        raise ConfigurationError(
            f"{folder} holds the results of {done.stage} with other inputs "
            f"(changed: {changed}): choose another --output or add --overwrite true."
        )


def different_inputs(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names, sorted, of the inputs in which two records differ."""
    return sorted(name for name in one | other if one.get(name) != other.get(name))


def read_record(folder: str | Path) -> Record | None:
    """Read the record of a finished stage; return None if the folder is missing or incomplete.

    Raises:
        InputError: the folder's `stage.json` is damaged.
    """
    path = join(folder, RECORD)
    if not exists(path):
        return None
    try:
        record = Record(**({"gpus": None} | json.loads(read_bytes(path))))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is not a stage's record: remove the folder that contains it and run the stage again."
        ) from error
    # The record names the folder in which it was written. The folder may have been copied since.
    record.folder = str(folder).rstrip("/") if is_s3(folder) else str(local_path(folder))
    return record


def require_record(folder: str | Path, stage: str) -> Record:
    """Read the record of a finished stage, which must exist.

    Raises:
        InputError: the folder has no record, or the record of another stage than `stage`.
    """
    record = read_record(folder)
    if record is None:
        raise InputError(
            f"{folder} holds no finished {stage}: run `slam-asr {stage}` first, or check the path."
        )
    if record.stage != stage:
        raise InputError(
            f"{folder} was written by {record.stage}, not by {stage}: give the folder of {stage}."
        )
    return record


def write_pointer(
    record: Record, path: str | Path, recipe: Recipe | None = None, store: str | None = None
) -> None:
    """Write a pointer: a small file that gives the next step the address of a stage's folder.

    Args:
        record: the stage's record.
        path: the pointer's file.
        recipe: the run's recipe, which the next steps read with `recipe_of`. A recipe in the folder cannot
            replace it: an earlier run may have written the folder, with other settings for later stages.
        store: if given, the record of this step of the run is also saved in this store; see `save_step`.
    """
    pointer: dict[str, Any] = {
        "uri": record.folder,
        # The record contains the inputs and the time at which the work ended, so its digest changes whenever
        # the results are replaced.
        "sha256": sha256_of_bytes(read_bytes(join(record.folder, RECORD))),
        "bytes": sum(f.bytes for f in walk(record.folder)),
        "stage": record.stage,
        "summary": record.summary,
        "fingerprint": digest(record.inputs),
    }
    if recipe is not None:
        pointer["recipe"] = asdict(recipe)
    write_bytes(path, json.dumps(pointer, indent=2, ensure_ascii=False) + "\n")
    if store is not None:
        used = {name: getattr(record, name) for name in ("reused", "seconds", "gpus", "cores")}
        save_step(StepRecord(record.stage, record.folder, record.summary, **used, time=time.time()), store)


def log_metrics(record: Record, log: Callable[[str, Any], None]) -> None:
    """Pass a stage's metrics to a dashboard's logger.

    A dashboard cannot save NaN or infinity as numbers, so they are passed as text.
    """
    for name, value in record.metrics.items():
        log(name, value if math.isfinite(value) else str(value))


def follow_pointer(path: str | Path) -> str:
    """Return the folder that a pointer names, after checking that its record is unchanged.

    Raises:
        InputError: the pointer is damaged, the folder is missing, or its record was replaced.
    """
    pointer = _read_pointer(path)
    folder, expected = pointer["uri"], pointer["sha256"]
    record = join(folder, RECORD)
    if not exists(record) or sha256_of_bytes(read_bytes(record)) != expected:
        raise InputError(f"{folder}, named by {path}, is gone or was replaced: run the previous step again.")
    return folder


def recipe_of(pointer: str | Path) -> Recipe:
    """Return the recipe that travels with a pointer.

    Raises:
        InputError: the pointer is damaged, or was written without a recipe.
        ConfigurationError: another version wrote the recipe, with keys that this version does not know.
    """
    recipe = _read_pointer(pointer).get("recipe")
    if not isinstance(recipe, dict):
        raise InputError(
            f"{pointer} has no recipe, so a single stage or an earlier version wrote it: "
            "run the previous step again, as a step of a pipeline."
        )
    return load_recipe(json.dumps(recipe))


def _read_pointer(path: str | Path) -> dict[str, Any]:
    try:
        pointer: dict[str, Any] = json.loads(read_bytes(path))
        _ = pointer["uri"], pointer["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not a pointer to a stage's folder ({type(error).__name__}): "
            "run the previous step again."
        ) from error
    return pointer


def follow_work_shards(paths: Iterable[str]) -> str:
    """Check the pointers of several work shards that share a feature store; return the first's folder.

    Raises:
        InputError: a pointer is damaged, its folder is missing, or its record was replaced.
    """
    first, *_ = [follow_pointer(path) for path in paths]
    return first
