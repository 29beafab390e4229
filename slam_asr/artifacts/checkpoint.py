"""Checkpoints: everything that a training run needs to resume as if it had never been interrupted.

A folder `step-N` contains these files. Frozen weights are not saved.

- `weights-R-of-W.safetensors` and `moments-R-of-W.safetensors`, written by process R of W: complete tensors
  in fp32, never pieces of one. The weights are saved by name, Adam's moments as `exp_avg/NAME` and
  `exp_avg_sq/NAME`. Any engine can resume from them with any number of processes. No pickle is ever read;
- `random-R-of-W.safetensors`: the state of process R's random number generators;
- `curve.jsonl`: the training curve up to this step;
- `checkpoint.json`: the step, the loop's counts, the inputs of the training, and the size and SHA-256 of
  every other file. It is written last. A folder without it is incomplete and ignored.

Next to these folders, the files `latest` and `best` are pointers: each contains the name of one folder. A
pointer is updated only after its folder is complete.
"""

import json
from collections.abc import Iterable
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
    upload,
    walk,
    write_bytes,
)
from slam_asr.storage.local import PARTIAL

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within the results of `train`."""
DESCRIPTION = "checkpoint.json"
LATEST, BEST = "latest", "best"
CURVE = "curve.jsonl"
BEGINNING, MAIN = "beginning", "main"
"""Names of a training run's phases: the beginning, which only some recipes have (`projector.beginning`), and
the training with the LLM's loss."""


@dataclass
class Checkpoint:
    """The content of `checkpoint.json`."""

    step: int
    """Number of optimiser steps that were done before this checkpoint."""
    epoch: int
    """Number of the epoch of the last step, counted from 0."""
    updates: int
    """Number of updates that Adam has made in this phase. Skipped steps, and the steps of an earlier phase,
    are not counted."""
    engine: str
    """The recipe's `training.engine`, such as `deepspeed`. In the beginning, DDP trains instead of it."""
    processes: int
    """Number of processes that trained."""
    inputs: dict[str, Any]
    """Everything that the weights depend on: models, data, and the part of the recipe that affects them."""
    counts: dict[str, Any] = field(default_factory=dict)
    """State of the training loop: the fields of `training.resumer.Counts`."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of the loss scaling in fp16; empty in other precisions."""
    dev_loss: float | None = None
    """Loss on the dev set after this step; None if it was not measured, and in the beginning."""
    phase: str = MAIN
    """The phase in which the weights and the moments were saved: `BEGINNING` or `MAIN`."""
    ctc_head: dict[str, Any] = field(default_factory=dict)
    """The CTC head as a model folder records it, for models that are converted before the training run ends.
    Empty if the model does not keep it, and in checkpoints of earlier versions."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each file, keyed by name: its size in bytes (`bytes`) and its SHA-256 (`sha256`)."""
    folder: str = ""
    """The folder that this description was read from. It is not saved in the file."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return folder_name(self.step)

    def file(self, name: str) -> str:
        """Return the local path of one of the checkpoint's files, after checking its SHA-256.

        Raises:
            ModelError: the file is missing, or differs from what was written.
        """
        path = join(self.folder, name)
        if not exists(path):
            raise ModelError(
                f"The checkpoint {self.folder} lacks {name}: copy the complete folder, or write the name of "
                f"an older checkpoint into the file {LATEST} beside it, to resume from that one."
            )
        local = fetch(path)
        if sha256_of_file(local) != self.files[name]["sha256"]:
            raise ModelError(
                f"{path} is damaged (its SHA-256 is not the one in {DESCRIPTION}): copy {self.folder} again "
                f"from where it came, or write the name of an older checkpoint into the file {LATEST} beside "
                "it, to resume from that one."
            )
        return str(local)

    def tensors(self, kind: str) -> LazyTensors:
        """Check the SHA-256 of all files of one kind, and open their tensors without loading them yet.

        Args:
            kind: `weights` or `moments`.

        Returns:
            The tensors of all processes by name, in fp32 on the CPU. A tensor is read on each access.

        Raises:
            ModelError: a file is missing or damaged.
        """
        return lazy_tensors(self.file(name) for name in sorted(self.files) if name.startswith(f"{kind}-"))


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint at a step. The names sort in the order of the steps."""
    # Eight digits: `prune` and `discard_newer_than_latest` compare names, and "step-10" < "step-9" as text.
    return f"step-{step:08d}"


def file_name(kind: str, rank: int, processes: int) -> str:
    """Return the name of the file of one kind that process `rank` of `processes` writes."""
    return f"{kind}-{rank:05d}-of-{processes:05d}.safetensors"


def find(folder: str, pointer: str = LATEST) -> Checkpoint | None:
    """Read the description of the checkpoint that a pointer names.

    Args:
        folder: the folder that contains all checkpoints.
        pointer: `latest` or `best`.

    Returns:
        The checkpoint, or None if the pointer does not exist.

    Raises:
        ModelError: the checkpoint is missing or incomplete, or its description is damaged.
    """
    name = _name_in(folder, pointer)
    if name is None:
        return None
    if not exists(join(folder, name, DESCRIPTION)):
        raise ModelError(
            f"{join(folder, pointer)} names {name}, which is missing or incomplete: copy the complete folder "
            f"{folder}, or remove it and train again."
        )
    return _read(folder, name)


def _name_in(folder: str, pointer: str) -> str | None:
    """Read the folder name that a pointer contains; return None if the pointer does not exist."""
    path = join(folder, pointer)
    return read_bytes(path).decode(errors="replace").strip() if exists(path) else None


def _read(folder: str, name: str) -> Checkpoint:
    description = join(folder, name, DESCRIPTION)
    try:
        return Checkpoint(**{**json.loads(read_bytes(description)), "folder": join(folder, name)})
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{description} is not a checkpoint's description: copy the complete folder {folder} again, "
            "remove it and train again, or use the version of slam-asr that wrote it."
        ) from error


def require(folder: str, pointer: str = LATEST) -> Checkpoint:
    """Read the description of the checkpoint that a pointer names, as `find` does; the pointer must exist.

    Raises:
        InputError: the folder holds no checkpoint.
        ModelError: the checkpoint is missing or incomplete, or its description is damaged.
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
        ModelError: the latest one is missing or incomplete, or a description is damaged.
    """
    latest = require(folder)
    names = _complete(f.name for f in walk(folder))
    # Later folders are not published yet: they are being written, or the attempt that wrote them was
    # interrupted.
    return [_read(folder, name) for name in names if name < latest.name] + [latest]


def publish(folder: str, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint's description and the pointers to it, and prune older checkpoints.

    All other files of the checkpoint must be complete. The description is written before the pointers, so
    readers never find an incomplete checkpoint.

    Args:
        folder: the folder that contains all checkpoints.
        checkpoint: the newest checkpoint.
        keep: how many of the newest checkpoints to retain. The best one is always retained.
    """
    content = asdict(checkpoint)
    del content["folder"]
    write_bytes(join(folder, checkpoint.name, DESCRIPTION), json.dumps(content, indent=2) + "\n")
    write_bytes(join(folder, LATEST), checkpoint.name)
    if checkpoint.dev_loss is not None:
        best = find(folder, BEST)
        if best is None or best.dev_loss is None or checkpoint.dev_loss < best.dev_loss:
            # Written before `prune` is called, so that `prune` removes the previous best checkpoint.
            write_bytes(join(folder, BEST), checkpoint.name)
    prune(folder, keep)


def prune(folder: str, keep: int) -> None:
    """Remove old checkpoints. The newest `keep` complete ones, the latest and the best one are retained.

    Folders of steps after the latest are not touched, because other processes may already be writing the next
    checkpoint.
    """
    latest = _name_in(folder, LATEST) or ""
    files = [f.name for f in walk(folder) if "/" in f.name]
    # Names sort as steps do, so comparing names compares steps.
    newest = [name for name in _complete(files) if name <= latest][-keep:]
    retained = {latest, _name_in(folder, BEST), *newest}
    old = [name for name in files if _folder_of(name) < latest and _folder_of(name) not in retained]
    _remove(folder, old)


def discard_newer_than_latest(folder: str) -> None:
    """Remove what an interrupted attempt left: checkpoints newer than the latest, and temporary files.

    Call it only while no process writes to the folder.
    """
    latest = _name_in(folder, LATEST) or ""
    names = [f.name for f in walk(folder)]
    leftover = [n for n in names if ("/" in n and _folder_of(n) > latest) or n.endswith(PARTIAL)]
    _remove(folder, leftover)


def recover(unsaved: str, folder: str, keep: int) -> None:
    """Upload the latest checkpoint of a local folder, if it is newer than the latest one in `folder`.

    Args:
        unsaved: local folder with the checkpoint that an earlier attempt could not upload, in the same layout
            as `folder`.
        folder: the folder that contains all checkpoints.
        keep: how many of the newest checkpoints to retain.
    """
    newer, latest = find(unsaved), find(folder)
    if newer is None or (latest is not None and latest.step >= newer.step):
        return
    # `file` checks each digest first, so a file that the disk damaged is not uploaded.
    for name in newer.files:
        upload(newer.file(name), join(folder, newer.name, name))
    publish(folder, newer, keep)


def clear(folder: str) -> None:
    """Remove all checkpoints, the pointers first, so that they never name a removed checkpoint."""
    for name in (LATEST, BEST):
        delete(join(folder, name))
    _remove(folder, [f.name for f in walk(folder)])


def _folder_of(name: str) -> str:
    return name.partition("/")[0]


def _complete(files: Iterable[str]) -> list[str]:
    """Return the names of the folders with a description, ordered by step."""
    return sorted({_folder_of(name) for name in files if name.endswith(f"/{DESCRIPTION}")})


def _remove(folder: str, files: list[str]) -> None:
    # The description is removed first, so that a half-removed checkpoint does not look complete.
    for name in sorted(files, key=lambda n: not n.endswith(f"/{DESCRIPTION}")):
        delete(join(folder, name))
    # Object storage has no folders.
    if not is_s3(folder) and local_path(folder).is_dir():
        for inner in local_path(folder).iterdir():
            if inner.is_dir() and not any(inner.iterdir()):
                inner.rmdir()
