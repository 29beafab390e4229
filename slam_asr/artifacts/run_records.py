"""The records of a run's steps: the result, whether it was reused, and the time and hardware that it took.

Several runs share a store, so a stage's record does not name the run that uses it. Each step therefore also
writes a small file to `STORE/run-records/RUN`. `run`, `status`, the run's copy of the report and the notice
at the end of the run read these files.
"""

import json
import os
from dataclasses import asdict, dataclass

from slam_asr.errors import InputError
from slam_asr.storage import digest, exists, join, read_bytes, walk, write_bytes

RUN = "SLAM_ASR_RUN"
"""Environment variable with the id of the run that a step belongs to."""
FOLDER = "run-records"


@dataclass(frozen=True)
class StepRecord:
    """The record of one step of a run. A step that runs once per work shard has a record for each."""

    stage: str
    folder: str
    """Folder of the result."""
    summary: str
    reused: bool
    """Whether the store had the result already."""
    seconds: float
    """Wall time in seconds of the work that made the result, perhaps in an earlier run."""
    gpus: int | None
    """Number of GPUs that computed the result; None if an earlier version of slam-asr computed it."""
    cores: int | None
    """Number of CPU cores that were usable; None if an earlier version of slam-asr computed the result."""
    time: float
    """Unix time at which the step ended."""


def save_step(step: StepRecord, store: str) -> None:
    """Save the record of a step that belongs to a run; do nothing outside of a run.

    Raises:
        OSError: the local store cannot be written.
        StorageError: object storage cannot be written.
    """
    run = os.environ.get(RUN)
    if not run:
        return
    path = join(store, FOLDER, run, f"{step.stage}-{digest(step.folder)[:12]}.json")
    # A step may fail after its work is done. When it is started again, it reuses its own result. The record
    # that it wrote with the work must then remain.
    if not (step.reused and exists(path)):
        write_bytes(path, json.dumps(asdict(step), indent=2, ensure_ascii=False) + "\n")


def read_steps(store: str, run: str) -> list[StepRecord]:
    """Read the records of a run's steps, in the order in which they ended; none if the run has none.

    Raises:
        InputError: a record is damaged.
        StorageError: the store cannot be read.
    """
    folder = join(store, FOLDER, run)
    steps = []
    for file in walk(folder):
        path = join(folder, file.name)
        try:
            steps.append(StepRecord(**json.loads(read_bytes(path))))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a step's record: remove it.") from error
    return sorted(steps, key=lambda step: step.time)
