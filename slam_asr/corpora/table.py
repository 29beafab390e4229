"""Tables: one utterance a row, in csv, tsv or parquet, with columns named by the recipe or by custom.

A table's utterances belong to the subsets that its split column names, or else to one that is called
like the file: train.tsv, dev.tsv, test.tsv. Relative audio paths count from the table's folder, or
from `data.audio_root`. Columns that are not asked for are carried along.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from slam_asr.corpora import NO_AUDIO, Candidate, Rejection, Stamp
from slam_asr.corpora.places import Unpacked, audio_path, files_in, if_present, is_file, stamps_of, stem_of
from slam_asr.corpora.rows import SUFFIXES, columns_of, rows
from slam_asr.errors import UserError
from slam_asr.recipe import Columns, Data

LAYOUT = ".csv, .tsv or .parquet files with a row an utterance"

_USUAL = {
    "audio": (
        "audio",
        "path",
        "file",
        "wav",
        "audio_path",
        "audio_file",
        "audio_filepath",
        "file_name",
        "filename",
        "filepath",
        "source",
    ),
    "text": ("text", "sentence", "transcript", "transcription", "target"),
    "key": ("id", "key", "utt_id", "utterance_id", "utt", "segment_id"),
    "split": ("split", "subset", "partition"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk", "spk_id"),
}
"""Names by which columns are known where the recipe names none; letters' case does not matter."""
_SHARD = re.compile(r"(?:^|[-_.])\d{4,5}(?:-of-\d{4,5})?$")
"""The number of a part, as data sets that are split over files have it."""
_OF_MANIFEST = ("key", "source", "target", "start", "duration", "sample_rate", "sha256", "subset", "speaker")
"""What a carried column may not be called: the manifest has its own."""


class Table(Unpacked):
    """The reader of one table, or of a folder of them.

    Args:
        root: the path that was given.
        files: tables, each with the subset of rows that name none.
        data: which columns there are, and where audio lies.
    """

    kind = "table"

    def __init__(self, root: str, files: dict[str, str], data: Data) -> None:
        self.root, self.files, self.data = root, files, data
        self._columns = {file: named_columns(file, data.columns) for file in files}
        self._subsets = {file: self._subsets_of(file) for file in files}

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Table | None":
        """The tables at a path, or None where there is none.

        Raises:
            UserError: a column is missing or ambiguous.
        """
        root = os.fspath(root)
        if root.lower().endswith(SUFFIXES) and is_file(root):
            return cls(root, {root: split_of(root) or stem_of(root)}, data or Data())
        files = files_in(root, SUFFIXES)
        return (
            cls(root, {file: split_of(file) or stem_of(file) for file in files}, data or Data())
            if files
            else None
        )

    def subsets(self) -> list[str]:
        return sorted(set().union(*self._subsets.values()))

    def stamps(self, subset: str) -> Iterator[Stamp]:
        named = [file for file in self.files if not self._embeds(file)]
        sources = (
            item.source
            for item in self._rows(subset, named)
            if isinstance(item, Candidate) and item.content is None
        )
        return stamps_of(self.files, sources, self.root)

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        return (if_present(item) if isinstance(item, Candidate) else item for item in self._rows(subset))

    def _subsets_of(self, file: str) -> set[str]:
        column = self._columns[file].split
        if not column:
            return {self.files[file]}
        return {self._subset(file, cells) for _, cells in rows(file, [column])}

    def _subset(self, file: str, cells: dict[str, Any]) -> str:
        named = cells.get(self._columns[file].split)
        return str(named).strip() if named is not None and str(named).strip() else self.files[file]

    def _embeds(self, file: str) -> bool:
        """Whether a table has its audio inside, by its first row."""
        first = next(rows(file), None)
        return first is not None and _audio(first[1][self._columns[file].audio], file)[1] is not None

    def _rows(self, subset: str, files: Iterable[str] | None = None) -> Iterator[Candidate | Rejection]:
        for file in (f for f in (self.files if files is None else files) if subset in self._subsets[f]):
            for number, cells in rows(file):
                if self._subset(file, cells) == subset:
                    yield self._candidate(file, number, cells, subset)

    def _candidate(self, file: str, number: int, cells: dict[str, Any], subset: str) -> Candidate | Rejection:
        columns, where = self._columns[file], f"{file}, row {number}"
        path, content = _audio(cells[columns.audio], f"{where}: the column {columns.audio}")
        start = _seconds(cells, columns.start, where)
        duration = None if start is None else _seconds(cells, columns.duration, where)
        key = (
            _key(cells.get(columns.key), path, start, where)
            if columns.key or path
            else f"{subset}-{stem_of(file)}-{number:07d}"
        )
        if not path and content is None:
            return Rejection(key, "", NO_AUDIO, f"{where} names no audio.")
        source = (
            where
            if not path
            else path
            if content is not None
            else audio_path(path, file, self.data.audio_root)
        )
        text = cells[columns.text]
        extra = {"subset": subset} | (
            {"speaker": str(cells[columns.speaker])} if cells.get(columns.speaker) else {}
        )
        extra |= _carried(cells, columns)
        return Candidate(key, source, "" if text is None else str(text), extra, start, duration, content)


def split_of(file: str) -> str:
    """What a table's name says of its rows: `train-00000-of-00004.parquet` → `train`; nothing for `0000.parquet`."""
    return _SHARD.sub("", stem_of(file))


def named_columns(file: str, asked: Columns) -> Columns:
    """The names of a table's columns, each asked for or found by custom; empty where there is none.

    Raises:
        UserError: one that is needed or asked for is not there, or several could be meant.
    """
    there = columns_of(file)
    found = {}
    for field in dataclasses.fields(Columns):
        name = getattr(asked, field.name)
        if name and name not in there:
            raise UserError(
                f"{file} has no column {name}, which data.columns.{field.name} names; it has {_listed(there)}."
            )
        found[field.name] = name or _usual(file, field.name, there)
    taken = [name for name in found.values() if name]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        roles = " and ".join(f"data.columns.{role}" for role, name in found.items() if name == twice)
        raise UserError(f"{file}: the column {twice} cannot be both {roles}; it has {_listed(there)}.")
    return Columns(**found)


def _usual(file: str, role: str, there: list[str]) -> str:
    names = [name for name in there if name.lower() in _USUAL.get(role, ())]
    if len(names) > 1 and role != "speaker":
        raise UserError(
            f"{file} has {len(names)} columns that may be its {role}, {' and '.join(names)}: say which by --data.columns.{role}; it has {_listed(there)}."
        )
    if not names and role in ("audio", "text"):
        raise UserError(
            f"{file} has no column of a usual name for its {role}: name it by --data.columns.{role}; it has {_listed(there)}."
        )
    return names[0] if names else ""


def _listed(columns: list[str]) -> str:
    shown = [name[:40] for name in columns[:20]]
    return f"the columns {', '.join(shown)}{', …' if len(columns) > 20 else ''}" if shown else "no columns"


def _audio(cell: Any, where: str) -> tuple[str, bytes | None]:
    """Path and content of a cell: a path, bytes, or both, as Hugging Face's Audio has them."""
    path, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else (cell, None)
    if isinstance(path, bytes):
        path, content = None, path
    if not isinstance(path, str | None) or not isinstance(content, bytes | None):
        raise UserError(
            f"{where} holds {type(cell).__name__}, neither a path nor an audio file's bytes: name the right column by --data.columns.audio."
        )
    return (path or "").strip(), content


def _key(cell: Any, path: str, start: float | None, where: str) -> str:
    if cell is not None and str(cell).strip():
        return str(cell).strip()
    if not path:
        raise UserError(f"{where} has no key: fill its column, or leave that column out.")
    key = os.path.splitext(path)[0]
    return key if start is None else f"{key}-{start:.2f}"


def _seconds(cells: dict[str, Any], column: str, where: str) -> float | None:
    if not column:
        return None
    try:
        value = float(cells[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{where}: {column} must be a number of seconds, not {str(cells[column])[:40]!r}.")
    return value


def _carried(cells: dict[str, Any], columns: Columns) -> dict[str, Any]:
    named = {*vars(columns).values(), *_OF_MANIFEST}
    return {
        name: value
        for name, value in cells.items()
        if name not in named
        and value not in (None, "")
        and isinstance(value, str | int | float)
        and value == value
        and value not in (math.inf, -math.inf)
    }
