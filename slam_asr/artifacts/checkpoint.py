"""Checkpoints: everything a training needs to resume as if it had never been interrupted.

A folder `step-N` holds the trained weights, and none of the frozen ones:

- `weights-R-of-W.safetensors` and `moments-R-of-W.safetensors`, one of each per process R of W: complete
  tensors in fp32 (weights by name; moments as `exp_avg/NAME` and `exp_avg_sq/NAME`). Any engine on any number
  of processes can resume from them, and no pickle is ever read;
- `random-R-of-W.safetensors`: the state of process R's random number generators;
- `curve.jsonl`: the curve up to this step;
- `checkpoint.json`: the step, the loop's counts, the inputs of the training, and size and SHA-256 of every
  file. It is written last; a folder without it is incomplete and ignored.

Next to these folders, the files `latest` and `best` each contain the name of one. They are updated last.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from slam_asr.errors import InputError, ModelError
from slam_asr.pretrained.lazy_tensors import LazyTensors, lazy_tensors
from slam_asr.storage import (
    delete,
    exists,
    fetch,
    is_s3,
    join,
    local_path,
    read_bytes,
    sha256_of_file,
    walk,
    write_bytes,
)
from slam_asr.storage.local import PARTIAL

DESCRIPTION = "checkpoint.json"
LATEST, BEST = "latest", "best"
CURVE = "curve.jsonl"


@dataclass
class Checkpoint:
    """The content of `checkpoint.json`."""

    step: int
    """Optimiser steps done."""
    epoch: int
    updates: int
    """Updates that Adam has made: fewer than steps if some were skipped."""
    engine: str
    processes: int
    inputs: dict[str, Any]
    """What the training depends on: models, data, and the part of the recipe that affects the weights."""
    counts: dict[str, Any] = field(default_factory=dict)
    """State of the training loop: the fields of `loop.Counts`."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    dev_loss: float | None = None
    """Dev loss after this step; None if it was not measured."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size in bytes and SHA-256 of each file, by name."""
    folder: str = ""
    """Folder that the description was read from; not part of the file."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return folder_name(self.step)

    def file(self, name: str) -> str:
        """Return a local path of one of its files, after comparing its SHA-256.

        Raises:
            ModelError: the file is missing, or differs from what was written.
        """
        path = join(self.folder, name)
        if not exists(path):
            raise ModelError(
                f"The checkpoint {self.folder} lacks {name}: copy the complete folder, or remove it and "
                "train again."
            )
        local = fetch(path)
        if sha256_of_file(local) != self.files[name]["sha256"]:
            raise ModelError(
                f"{path} is damaged (its SHA-256 is not the one in {DESCRIPTION}): remove {self.folder}, "
                "and the training resumes from an older checkpoint."
            )
        return str(local)

    def tensors(self, kind: str) -> LazyTensors:
        """Tensors of all files of one kind (`weights` or `moments`), by name; each is read on first use."""
        return lazy_tensors(self.file(name) for name in sorted(self.files) if name.startswith(f"{kind}-"))


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def file_name(kind: str, rank: int, processes: int) -> str:
    """Name of the file of one kind that one process writes."""
    return f"{kind}-{rank:05d}-of-{processes:05d}.safetensors"


def find(folder: str, pointer: str = LATEST) -> Checkpoint | None:
    """Read the description of the checkpoint that a pointer names.

    Args:
        folder: of all checkpoints.
        pointer: `latest` or `best`.

    Returns:
        The checkpoint, or None if the pointer does not exist.

    Raises:
        ModelError: the checkpoint is missing or incomplete.
    """
    path = join(folder, pointer)
    if not exists(path):
        return None
    name = read_bytes(path).decode(errors="replace").strip()
    if not exists(join(folder, name, DESCRIPTION)):
        raise ModelError(
            f"{path} names {name}, which is missing or incomplete: copy the complete folder {folder}, or "
            "remove it and train again."
        )
    return _read(folder, name)


def _read(folder: str, name: str) -> Checkpoint:
    description = join(folder, name, DESCRIPTION)
    try:
        return Checkpoint(**{**json.loads(read_bytes(description)), "folder": join(folder, name)})
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{description} is not a checkpoint's description: remove that folder, or train with the version "
            "that wrote it."
        ) from error


def require(folder: str, pointer: str = LATEST) -> Checkpoint:
    """Read the description of the checkpoint that a pointer names, which must exist.

    Raises:
        InputError: the folder holds no checkpoint.
        ModelError: the checkpoint is missing or incomplete.
    """
    checkpoint = find(folder, pointer)
    if checkpoint is None:
        raise InputError(
            f"{folder} holds no checkpoint (no file `{pointer}`): run `slam-asr train` first, or check the "
            "path."
        )
    return checkpoint


def all_complete(folder: str) -> list[Checkpoint]:
    """Read the descriptions of all complete checkpoints up to the latest, ordered by step.

    Raises:
        InputError: the folder holds no checkpoint.
        ModelError: the latest one is missing or incomplete.
    """
    latest = require(folder)
    names = sorted(
        {
            name.partition("/")[0]
            for name in (f.name for f in walk(folder))
            if name.endswith(f"/{DESCRIPTION}")
        }
    )
    return [_read(folder, name) for name in names if name < latest.name] + [latest]


def publish(folder: str, checkpoint: Checkpoint, keep: int) -> None:
    """Publish a checkpoint whose other files are complete, and prune older ones.

    Writes the description and then the pointers: readers cannot see the checkpoint before that.

    Args:
        folder: of all checkpoints.
        checkpoint: the newest.
        keep: number of the newest checkpoints to retain; the best one is always retained.
    """
    content = asdict(checkpoint)
    del content["folder"]
    write_bytes(join(folder, checkpoint.name, DESCRIPTION), json.dumps(content, indent=2) + "\n")
    write_bytes(join(folder, LATEST), checkpoint.name)
    best = None if checkpoint.dev_loss is None else find(folder, BEST)
    if checkpoint.dev_loss is not None and (
        best is None or best.dev_loss is None or checkpoint.dev_loss < best.dev_loss
    ):
        write_bytes(join(folder, BEST), checkpoint.name)
    prune(folder, keep)


def prune(folder: str, keep: int) -> None:
    """Remove checkpoints before the latest, except the newest `keep` complete ones and the best one.

    Folders after the latest are not touched: other processes may already be writing the next checkpoint.
    """
    latest, *best = [
        read_bytes(join(folder, p)).decode().strip() for p in (LATEST, BEST) if exists(join(folder, p))
    ]
    files = [f.name for f in walk(folder) if "/" in f.name]
    complete = sorted({name.partition("/")[0] for name in files if name.endswith(f"/{DESCRIPTION}")})
    retained = {latest, *best, *[name for name in complete if name <= latest][-keep:]}
    _remove(
        folder,
        [
            name
            for name in files
            if name.partition("/")[0] < latest and name.partition("/")[0] not in retained
        ],
    )


def discard_newer_than_latest(folder: str) -> None:
    """Remove what an interrupted attempt left: checkpoints after the latest, and temporary files.

    Call it only while no process writes to the folder.
    """
    latest = read_bytes(join(folder, LATEST)).decode().strip() if exists(join(folder, LATEST)) else ""
    names = [f.name for f in walk(folder)]
    _remove(
        folder,
        [
            name
            for name in names
            if ("/" in name and name.partition("/")[0] > latest) or name.endswith(PARTIAL)
        ],
    )


def _remove(folder: str, files: list[str]) -> None:
    # The description goes first, so that a half-removed checkpoint does not look complete.
    for name in sorted(files, key=lambda n: not n.endswith(f"/{DESCRIPTION}")):
        delete(join(folder, name))
    _remove_empty(folder)


def clear(folder: str) -> None:
    """Remove all checkpoints; the pointers go first, so that they never name a removed one."""
    for name in (LATEST, BEST):
        delete(join(folder, name))
    for file in list(walk(folder)):
        delete(join(folder, file.name))
    _remove_empty(folder)


def _remove_empty(folder: str) -> None:
    if not is_s3(folder) and local_path(folder).is_dir():
        for inner in local_path(folder).iterdir():
            if inner.is_dir() and not any(inner.iterdir()):
                inner.rmdir()
