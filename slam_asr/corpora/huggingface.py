"""A Hugging Face dataset on disk, read without its library.

1. What `save_to_disk` writes: <split>/data-*.arrow with state.json, and dataset_dict.json above; or one split.
2. Parquet files as the hub has them: data/train-00000-of-00004.parquet, or <split>/0000.parquet.
3. An `audiofolder`: metadata.csv or metadata.jsonl with a column file_name, in the folder or in one a split.

Audio inside a table (a column of {bytes, path}) becomes files in the stage's folder.
"""

import json
import os

from slam_asr.corpora.places import files_in, is_file, is_folder, visible_files, visible_folders
from slam_asr.corpora.rows import columns_of
from slam_asr.corpora.table import Table, split_of
from slam_asr.errors import UserError
from slam_asr.recipe import Data
from slam_asr.storage import join, name_of, parent_of, read_bytes

LAYOUT = "what save_to_disk writes, parquet files, or metadata.csv with a column file_name"
_STATE = "state.json"
_METADATA = ("metadata.csv", "metadata.jsonl")


class HuggingFace(Table):
    """The reader of one dataset."""

    kind = "Hugging Face dataset"

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "HuggingFace | None":
        """The dataset in a folder, or None where the folder is laid out in another way.

        Raises:
            UserError: a column is missing or ambiguous, or the dataset was saved in a way that is not read.
        """
        root = os.fspath(root)
        if not is_folder(root):
            return None
        files = _saved(root) or _described(root) or _parquet(root)
        return cls(root, files, data or Data()) if files else None


class Saved(HuggingFace):
    """A dataset that says what it is by files of its own."""

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Saved | None":
        """The dataset in a folder, or None where it is none or only parquet files."""
        root = os.fspath(root)
        files = (_saved(root) or _described(root)) if is_folder(root) else {}
        return cls(root, files, data or Data()) if files else None


def _saved(root: str) -> dict[str, str]:
    """Arrow files of a saved dataset, each with its split."""
    if is_file(join(root, _STATE)):
        return _of_state(root, name_of(root))
    if is_file(join(root, "dataset_dict.json")):
        splits = [name for name in visible_folders(root) if is_file(join(root, name, _STATE))]
        return {file: split for name in splits for file, split in _of_state(join(root, name), name).items()}
    if is_file(join(root, "dataset_info.json")):
        return {
            file: _split_in_cache(file)
            for file in files_in(root, (".arrow",))
            if not name_of(file).startswith("cache-")
        }
    return {}


def _of_state(folder: str, split: str) -> dict[str, str]:
    path = join(folder, _STATE)
    try:
        state = json.loads(read_bytes(path))
        names = [file["filename"] for file in state["_data_files"]]
        indices = state.get("_indices_files") or state.get("_indices_data_files")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not what save_to_disk writes ({type(error).__name__}): save the dataset again."
        ) from error
    if indices:
        raise UserError(
            f"{folder} holds a selection of rows that is kept apart from its data: save it after `flatten_indices()`."
        )
    for name in names:
        if name != os.path.basename(name) or not is_file(join(folder, name)):
            raise UserError(f"{folder} lacks {name}, which its {_STATE} names: copy the folder whole.")
    # A split without rows is a saved split too.
    return {join(folder, name): split for name in names}


def _split_in_cache(file: str) -> str:
    """`librispeech_asr-train.clean.100-00000-of-00010.arrow` → `train.clean.100`."""
    stem = split_of(file)
    return stem.partition("-")[2] or stem


def _described(root: str) -> dict[str, str]:
    """metadata files of an audiofolder, each with the split that its folder is called after."""
    found: dict[str, str] = {}
    for folder in (
        root,
        *(join(root, name) for name in visible_folders(root)),
        *(join(root, "data", n) for n in visible_folders(join(root, "data"))),
    ):
        path = next((p for name in _METADATA if is_file(p := join(folder, name))), None)
        if path and "file_name" in columns_of(path):
            found[path] = name_of(folder)
    return found


def _parquet(root: str) -> dict[str, str]:
    """Parquet files anywhere below, each with the split that it or its folder is called after."""
    found = {}
    for file in visible_files(root):
        if file.name.lower().endswith(".parquet"):
            path = join(root, file.name)
            found[path] = split_of(file.name) or name_of(parent_of(path))
    return found
