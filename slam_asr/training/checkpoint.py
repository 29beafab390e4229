"""Checkpoints: all that a training needs to go on as if nothing had happened.

A folder `step-N` holds what was trained, and nothing of what is frozen:

- `weights-R-of-W.safetensors` and `moments-R-of-W.safetensors`, of each of W processes: whole tensors in
  fp32 (weights by name; `exp_avg/NAME` and `exp_avg_sq/NAME`), so that any engine on any number of
  processes can go on from them, and no pickle is ever read;
- `random-R-of-W.safetensors`: the state of that process' random numbers;
- `curve.jsonl`: the curve up to there;
- `checkpoint.json`, written last: the step, what the loop counts, the inputs of the training, and size and
  SHA-256 of every file. A folder without it does not count.

Beside the folders, `latest` and `best` name one of them each, and move last.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from slam_asr.errors import UserError
from slam_asr.models.tensors import Tensors, stored_tensors
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
    """What `checkpoint.json` says."""

    step: int
    """Optimiser steps done."""
    epoch: int
    updates: int
    """Of Adam: fewer than steps where some were left out."""
    engine: str
    processes: int
    inputs: dict[str, Any]
    """Of the training: models, data, and the recipe as far as it decides the weights."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What the loop keeps over its steps."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    dev_loss: float | None = None
    """After this very step, where it was measured."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size in bytes and SHA-256 of each file, by name."""
    folder: str = ""

    @property
    def name(self) -> str:
        return folder_name(self.step)

    def file(self, name: str) -> str:
        """A local path with a file's content, compared with what was written.

        Raises:
            UserError: it is missing, or is not what was written.
        """
        path = join(self.folder, name)
        if not exists(path):
            raise UserError(
                f"The checkpoint {self.folder} lacks {name}: copy it whole, or remove that folder and train again."
            )
        local = fetch(path)
        if sha256_of_file(local) != self.files[name]["sha256"]:
            raise UserError(
                f"{path} is damaged (its SHA-256 is not the one in {DESCRIPTION}): remove {self.folder}, and the training goes on from an older one."
            )
        return str(local)

    def tensors(self, kind: str) -> Tensors:
        """All tensors of the files of one kind (`weights`, `moments`), by name; none is read before it is asked for."""
        return stored_tensors(self.file(name) for name in sorted(self.files) if name.startswith(f"{kind}-"))


def folder_name(step: int) -> str:
    """Of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def file_name(kind: str, rank: int, processes: int) -> str:
    """Of what one process writes."""
    return f"{kind}-{rank:05d}-of-{processes:05d}.safetensors"


def find(folder: str, pointer: str = LATEST) -> Checkpoint | None:
    """The checkpoint that a pointer names, or None where there is none.

    Raises:
        UserError: the checkpoint is not there, or not whole.
    """
    path = join(folder, pointer)
    if not exists(path):
        return None
    name = read_bytes(path).decode(errors="replace").strip()
    if not exists(join(folder, name, DESCRIPTION)):
        raise UserError(
            f"{path} names {name}, which is not there or not whole: copy the whole folder {folder}, or remove it and train again."
        )
    return _read(folder, name)


def _read(folder: str, name: str) -> Checkpoint:
    description = join(folder, name, DESCRIPTION)
    try:
        return Checkpoint(**{**json.loads(read_bytes(description)), "folder": join(folder, name)})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{description} is not a checkpoint's description: remove that folder, or train with the version that wrote it."
        ) from error


def require(folder: str, pointer: str = LATEST) -> Checkpoint:
    """The same, where there must be one.

    Raises:
        UserError: there is none, or it is not whole.
    """
    found = find(folder, pointer)
    if found is None:
        raise UserError(
            f"{folder} holds no checkpoint (no file `{pointer}`): run `slam-asr train` first, or check the path."
        )
    return found


def all_kept(folder: str) -> list[Checkpoint]:
    """All whole checkpoints up to the latest, by step.

    Raises:
        UserError: there is none, or the latest is not whole.
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
    """Let a checkpoint count whose files are all there, and remove those that need not be kept.

    Args:
        folder: of all checkpoints.
        checkpoint: the newest.
        keep: how many of the last ones stay; the best one does in any case.
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
    """Remove all checkpoints before the latest but the last `keep` whole ones and the best one.

    Those behind it are left alone: other processes may be at the next one already.
    """
    latest, *best = [
        read_bytes(join(folder, p)).decode().strip() for p in (LATEST, BEST) if exists(join(folder, p))
    ]
    files = [f.name for f in walk(folder) if "/" in f.name]
    whole = sorted({name.partition("/")[0] for name in files if name.endswith(f"/{DESCRIPTION}")})
    kept = {latest, *best, *[name for name in whole if name <= latest][-keep:]}
    _remove(
        folder,
        [name for name in files if name.partition("/")[0] < latest and name.partition("/")[0] not in kept],
    )


def discard_newer_than_latest(folder: str) -> None:
    """Remove what an earlier attempt has begun behind its latest checkpoint, or was writing when it was killed; only while nobody writes."""
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
    # The description goes first: what is half-removed must not look whole.
    for name in sorted(files, key=lambda n: not n.endswith(f"/{DESCRIPTION}")):
        delete(join(folder, name))
    _remove_empty(folder)


def clear(folder: str) -> None:
    """Remove all checkpoints; the pointers first."""
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
