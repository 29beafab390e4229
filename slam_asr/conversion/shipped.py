"""Trained projectors that come with the package, each a model folder with its model card (README.md)."""

import os
from pathlib import Path

from slam_asr.storage import fetch_folder

FOLDER = Path(__file__).parents[1] / "projectors"


def shipped_models() -> dict[str, Path]:
    """The folder of each shipped model, by name."""
    return (
        {folder.name: folder for folder in sorted(FOLDER.iterdir()) if folder.is_dir()}
        if FOLDER.is_dir()
        else {}
    )


def fetch_model(model: str | os.PathLike) -> Path:
    """The local folder of a model: a shipped one by its name, any other by its path or s3:// prefix.

    Raises:
        OSError: the disk is full, or fails.
        StorageError: the prefix holds no objects, or cannot be read.
    """
    return shipped_models().get(str(model)) or fetch_folder(model)
