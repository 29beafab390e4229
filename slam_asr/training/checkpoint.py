"""Checkpoints on disk: what DeepSpeed writes, and a pointer that moves last."""

import shutil
from pathlib import Path

from slam_asr.errors import UserError
from slam_asr.storage import join, upload, write_atomically

POINTER = "latest"
WRITTEN_BY_ALL = ("mp_rank_00_model_states.pt",)


def publish(folder: Path, tag: str) -> None:
    """Name `tag` the latest complete checkpoint and remove the others.

    Called by one process, after all have written theirs.
    """
    write_atomically(folder / POINTER, tag)
    for other in folder.iterdir():
        if other.is_dir() and other.name != tag:
            shutil.rmtree(other)


def contribute(folder: Path, tag: str, to: str) -> None:
    """Upload what this machine's processes wrote of a checkpoint to where the first machine's will be.

    What every machine writes alike is the first one's to publish.
    """
    for file in sorted((folder / tag).iterdir()):
        if file.is_file() and file.name not in WRITTEN_BY_ALL:
            upload(file, join(to, tag, file.name))


def latest(folder: Path) -> Path:
    """The folder of the latest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    pointer = folder / POINTER
    if not pointer.is_file():
        raise UserError(f"{folder} holds no checkpoint (no file `{POINTER}`): run `slam-asr train` first, or check the path.")
    target = folder / pointer.read_text().strip()
    if not target.is_dir():
        raise UserError(f"{pointer} names {target.name}, which is not there: the checkpoint is incomplete; train again.")
    return target
