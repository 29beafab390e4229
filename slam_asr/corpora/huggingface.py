"""Reader for Hugging Face datasets on disk, without the `datasets` library. Three layouts are read:

1. The output of `save_to_disk`: dataset_dict.json, and data-*.arrow with state.json in a folder per split; or
   the folder of a single split. A folder of the `datasets` library's cache, with dataset_info.json and arrow
   files, is read too.
2. Parquet files as on the hub: data/train-00000-of-00004.parquet, or <split>/0000.parquet; or several
   configurations, <configuration>/train-00000-of-00004.parquet or <configuration>/<split>/0000.parquet.
3. An `audiofolder`: metadata.csv or metadata.jsonl with a column file_name, in the dataset's folder or in a
   subfolder per split, which may also be in the subfolder data.

Audio that is embedded in a table (a column of {bytes, path}) is written to files in the stage's folder.
"""

import json
import os
from collections.abc import Callable
from typing import ClassVar

from slam_asr.config.recipe import Data
from slam_asr.corpora.places import files_in, is_folder, visible_files, visible_folders
from slam_asr.corpora.rows import columns_of
from slam_asr.corpora.table import Table, split_of
from slam_asr.errors import InputError
from slam_asr.storage import exists, join, name_of, parent_of, read_bytes

_STATE = "state.json"
_METADATA = ("metadata.csv", "metadata.jsonl")


def _saved(root: str) -> dict[str, str]:
    """Find the arrow files of layout 1, or of the `datasets` library's cache; return the split of each."""
    if exists(join(root, _STATE)):
        return dict.fromkeys(_saved_files(root), name_of(root))
    if exists(join(root, "dataset_dict.json")):
        splits = [name for name in visible_folders(root) if exists(join(root, name, _STATE))]
        return {file: split for split in splits for file in _saved_files(join(root, split))}
    if exists(join(root, "dataset_info.json")):
        # In the cache, files named cache-… hold the results of `map` and `filter`, not the dataset itself.
        files = [file for file in files_in(root, (".arrow",)) if not name_of(file).startswith("cache-")]
        return {file: _split_in_cache(file) for file in files}
    return {}


def _saved_files(folder: str) -> list[str]:
    """Return the arrow files that the state.json of a split lists."""
    path = join(folder, _STATE)
    try:
        state = json.loads(read_bytes(path))
        names = [file["filename"] for file in state["_data_files"]]
        indices = state.get("_indices_files") or state.get("_indices_data_files")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} was not written by save_to_disk ({type(error).__name__}): save the dataset again."
        ) from error
    if indices:
        raise InputError(
            f"{folder} holds a selection of rows as separate indices: "
            "call `flatten_indices()` and save it again."
        )
    for name in names:
        # A name that contains a folder could refer to a file outside the dataset.
        if name != os.path.basename(name) or not exists(join(folder, name)):
            raise InputError(f"{folder} lacks {name}, which its {_STATE} names: copy the complete folder.")
    return [join(folder, name) for name in names]


def _split_in_cache(file: str) -> str:
    """Return the split in a cached file's name: `asr-train.clean-00000-of-00010.arrow` → `train.clean`."""
    stem = split_of(file)
    return stem.partition("-")[2] or stem


def _described(root: str) -> dict[str, str]:
    """Find the metadata files of layout 3; return the split of each, which is the name of its folder."""
    files: dict[str, str] = {}
    parents = (root, join(root, "data"))
    for folder in (root, *(join(parent, name) for parent in parents for name in visible_folders(parent))):
        # At most one file per folder is read. With both, the rows would be read twice.
        path = next((p for name in _METADATA if exists(p := join(folder, name))), None)
        if path and "file_name" in columns_of(path):
            files[path] = name_of(folder)
    return files


def _parquet(root: str) -> dict[str, str]:
    """Find parquet files at any depth (layout 2); return the subset of each.

    The subset is the split in the file's name, or else the folder's name. If the dataset has several
    configurations, in a folder each, it is `configuration/split`.
    """
    splits: dict[str, tuple[str, str]] = {}
    for file in visible_files(root):
        if file.name.lower().endswith(".parquet"):
            path = join(root, file.name)
            split = split_of(file.name) or name_of(parent_of(path))
            folders = file.name.split("/")[:-1]
            splits[path] = "/".join(f for f in folders if f not in ("data", split)), split
    # The name of a single configuration, such as `default`, would only lengthen the names of the subsets.
    several = len({configuration for configuration, _ in splits.values()}) > 1
    return {
        path: f"{configuration}/{split}" if several and configuration else split
        for path, (configuration, split) in splits.items()
    }


class Saved(Table):
    """The reader of a dataset with files that only Hugging Face datasets have: layouts 1 and 3."""

    kind = "Hugging Face dataset"
    layout = "the output of save_to_disk, parquet files, or metadata.csv with a column file_name"
    _layouts: ClassVar[tuple[Callable[[str], dict[str, str]], ...]] = (_saved, _described)

    @classmethod
    def find(cls, root: str, data: Data) -> "Saved | None":
        """Open the dataset in a folder; return None if the folder has another layout.

        Raises:
            InputError: the dataset is incomplete or was saved in an unsupported form.
            ConfigurationError: a column is missing or ambiguous.
        """
        found = (layout(root) for layout in cls._layouts) if is_folder(root) else ()
        files = next(filter(None, found), None)
        return cls(root, files, data) if files else None


class HuggingFace(Saved):
    """The reader of a dataset in any of the three layouts."""

    _layouts = (_saved, _described, _parquet)
