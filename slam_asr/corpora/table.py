"""Reader for tables (csv, tsv or parquet) with one utterance per row.

The recipe's `data.columns` names the columns. A column that it does not name is recognised by its usual name.
A split column names each utterance's subset. Without one, the subset is named after the file, such as
train.tsv. Relative audio paths are resolved against the table's folder, or against `data.audio_root`.
Other columns are copied to the manifest.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from slam_asr.config.recipe import Columns, Data
from slam_asr.corpora import NO_AUDIO, Candidate, Rejection
from slam_asr.corpora.places import ListedCorpus, audio_path, files_at, stem_of
from slam_asr.corpora.rows import SUFFIXES, columns_of, rows
from slam_asr.errors import ConfigurationError, InputError

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
"""Names by which a role's column is recognised, in upper or lower case, if the recipe does not name it."""
_FILE_NUMBER = re.compile(r"(?:^|[-_.])\d{4,5}(?:-of-\d{4,5})?$")
"""Matches the number at the end of a file's name, in data sets that are divided into several files."""
_MANIFEST_FIELDS = (
    "key",
    "source",
    "target",
    "start",
    "duration",
    "sample_rate",
    "sha256",
    "subset",
    "speaker",
)
"""Names of columns that are not copied, because the manifest has its own fields of these names."""


class Table(ListedCorpus):
    """The reader of one table, or of a folder of tables.

    Args:
        root: the corpus's absolute path or URI.
        files: the subset of each table file, for rows whose split column is empty or missing.
        data: the recipe's `data` section.
    """

    kind = "table"
    layout = ".csv, .tsv or .parquet files with a row per utterance"

    def __init__(self, root: str, files: dict[str, str], data: Data) -> None:
        self.root, self.files, self.data = root, files, data
        self._columns = {file: named_columns(file, data.columns) for file in files}
        self.by_subset: dict[str, list[str]] = {}
        for file in files:
            for subset in self._subsets_of(file):
                self.by_subset.setdefault(subset, []).append(file)

    @classmethod
    def find(cls, root: str, data: Data) -> "Table | None":
        """Open the tables at a path; None if there are none.

        Raises:
            InputError: a file cannot be read as a table.
            ConfigurationError: a column is missing or ambiguous.
        """
        files = {file: split_of(file) or stem_of(file) for file in files_at(root, SUFFIXES)}
        return cls(root, files, data) if files else None

    def lists(self, subset: str) -> Iterable[str]:
        return self.files

    def sources(self, subset: str) -> Iterator[str]:
        # Embedded audio changes with its table, so such a table is not read for the names of audio files.
        files = [file for file in self.by_subset[subset] if not self._has_embedded_audio(file)]
        for item in self._rows(subset, files):
            if isinstance(item, Candidate) and item.content is None:
                yield item.source

    def items(self, subset: str) -> Iterator[Candidate | Rejection]:
        return self._rows(subset, self.by_subset[subset])

    def _subsets_of(self, file: str) -> set[str]:
        column = self._columns[file].split
        if not column:
            return {self.files[file]}
        return {self._subset(file, cells) for _, cells in rows(file, [column])}

    def _subset(self, file: str, cells: dict[str, Any]) -> str:
        cell = cells.get(self._columns[file].split)
        return str(cell).strip() if cell is not None and str(cell).strip() else self.files[file]

    def _has_embedded_audio(self, file: str) -> bool:
        """Whether the first row of a table contains audio itself rather than the path of a file."""
        first = next(rows(file), None)
        return first is not None and _audio(first[1][self._columns[file].audio], file)[1] is not None

    def _rows(self, subset: str, files: Iterable[str]) -> Iterator[Candidate | Rejection]:
        for file in files:
            for number, cells in rows(file):
                if self._subset(file, cells) == subset:
                    yield self._candidate(file, number, cells, subset)

    def _candidate(self, file: str, number: int, cells: dict[str, Any], subset: str) -> Candidate | Rejection:
        columns, where = self._columns[file], f"{file}, row {number}"
        path, content = _audio(cells[columns.audio], f"{where}: the column {columns.audio}")
        start = _seconds(cells, columns.start, where)
        duration = None if start is None else _seconds(cells, columns.duration, where)
        # Audio that is embedded without a name gives no key, so a row without one is numbered.
        key = (
            _key(cells.get(columns.key), path, start, where)
            if columns.key or path
            else f"{subset}-{stem_of(file)}-{number:07d}"
        )
        if content is None:
            if not path:
                return Rejection(key, "", NO_AUDIO, f"{where} has no audio.")
            source = audio_path(path, file, self.data.audio_root)
        else:
            source = path or where
        text = cells[columns.text]
        extra = {"subset": subset} | (
            {"speaker": str(cells[columns.speaker])} if cells.get(columns.speaker) else {}
        )
        extra |= _other_columns(cells, columns)
        return Candidate(key, source, "" if text is None else str(text), extra, start, duration, content)


def split_of(file: str) -> str:
    """The name of a file without its suffix and number: `train-00000-of-00004.parquet` → `train`.

    It is empty for a name that is only a number, such as `0000.parquet`.
    """
    return _FILE_NUMBER.sub("", stem_of(file))


def named_columns(file: str, columns: Columns) -> Columns:
    """Find the column of each role, from the recipe or by a usual name. A role without a column is empty.

    Raises:
        ConfigurationError: a named or required column is missing, several columns may have one role, or one
            column has several.
    """
    available = columns_of(file)
    names = {}
    for field in dataclasses.fields(Columns):
        name = getattr(columns, field.name)
        if name and name not in available:
            raise ConfigurationError(
                f"{file} has no column {name}, which data.columns.{field.name} names; "
                f"it has {_listed(available)}."
            )
        names[field.name] = name or _usual(file, field.name, available)
    used = [name for name in names.values() if name]
    if repeated := next((name for name in used if used.count(name) > 1), None):
        roles = " and ".join(f"data.columns.{role}" for role, name in names.items() if name == repeated)
        raise ConfigurationError(
            f"{file}: the column {repeated} cannot be both {roles}; it has {_listed(available)}."
        )
    return Columns(**names)


def _usual(file: str, role: str, available: list[str]) -> str:
    """The column with a usual name for a role; empty if an optional role has no such column."""
    names = [name for name in available if name.lower() in _USUAL.get(role, ())]
    if len(names) > 1 and role != "speaker":
        raise ConfigurationError(
            f"{file} has {len(names)} columns that may be its {role}, {' and '.join(names)}: "
            f"name one with --data.columns.{role}; it has {_listed(available)}."
        )
    if not names and role in ("audio", "text"):
        raise ConfigurationError(
            f"{file} has no column with a usual name for its {role}: "
            f"name it with --data.columns.{role}; it has {_listed(available)}."
        )
    return names[0] if names else ""


def _listed(columns: list[str]) -> str:
    shown = [name[:40] for name in columns[:20]]
    return f"the columns {', '.join(shown)}{', …' if len(columns) > 20 else ''}" if shown else "no columns"


def _audio(cell: Any, where: str) -> tuple[str, bytes | None]:
    """Return the audio's path and its bytes, if any.

    A cell is one of the two, or a dictionary of both, as Hugging Face's Audio writes.
    """
    path, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else (cell, None)
    if isinstance(path, bytes):
        path, content = None, path
    if not isinstance(path, str | None) or not isinstance(content, bytes | None):
        raise InputError(
            f"{where} is of type {type(cell).__name__}, neither a path nor an audio file's bytes: "
            "name the right column with --data.columns.audio."
        )
    return (path or "").strip(), content


def _key(cell: Any, path: str, start: float | None, where: str) -> str:
    """The key in a cell; if the cell is empty, a key made from the audio's path and the segment's start."""
    if cell is not None and str(cell).strip():
        return str(cell).strip()
    if not path:
        raise InputError(f"{where} has no key: fill in its column, or remove the column.")
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
        raise InputError(f"{where}: {column} must be a number of seconds, not {str(cells[column])[:40]!r}.")
    return value


def _other_columns(cells: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The cells to copy to the manifest: texts and finite numbers in columns that have no role."""
    excluded = {*vars(columns).values(), *_MANIFEST_FIELDS}
    return {
        name: value
        for name, value in cells.items()
        if name not in excluded
        and value not in (None, "")
        and isinstance(value, str | int | float)
        and value == value  # not NaN
        and value not in (math.inf, -math.inf)
    }
