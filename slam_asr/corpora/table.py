"""Reader for tables (csv, tsv or parquet) with one utterance per row.

The recipe's `data.columns` names the columns. A column that it does not name is recognised by its usual name,
except the start and the duration of segments, which have no usual names. A split column names each
utterance's subset. Without one, the subset is named after the file, such as train.tsv. Relative audio paths
are resolved against the table's folder, or against `data.audio_root`. Texts and numbers in other columns are
copied to the manifest, except from columns that have the name of a manifest's field or no name, such as an
index that pandas wrote.

Names repeat in many data sets: each split numbers its files from 0, or an id means a sentence that several
people read. If several rows with different audio have the same key, longer keys are made; see
`Table.refine_keys`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from slam_asr.config.recipe import Columns, Data
from slam_asr.corpora import Candidate, Item, Reason, Rejection
from slam_asr.corpora.places import ListedCorpus, audio_path, files_at, stem_of
from slam_asr.corpora.rows import SUFFIXES, columns_of, rows
from slam_asr.corpora.splits import requested_splits
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.storage import name_of

_USUAL = {
    "audio": (
        *("audio", "path", "file", "wav", "audio_path", "audio_file"),
        *("audio_filepath", "file_name", "filename", "filepath", "source"),
    ),
    "text": ("text", "sentence", "transcript", "transcription", "target"),
    "key": ("id", "key", "utt_id", "utterance_id", "utt", "segment_id"),
    "split": ("split", "subset", "partition"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk", "spk_id"),
}
"""For each role, the names by which its column is recognised if the recipe names none. Upper and lower case
are not distinguished."""
_FILE_NUMBER = re.compile(r"(?:^|[-_.])\d{4,5}(?:-of-\d{4,5}(?:-[0-9a-f]{16})?)?$")
"""Matches the number at the end of a file's name if a data set is divided into several files.

Older versions of the datasets library add a digest: `train-00000-of-00002-a1b2c3d4e5f6a7b8.parquet`.
"""
_UNNAMED = re.compile(r"\s*|Unnamed: \d.*|__index_level_\d+__")
"""Matches what stands for a missing column name: blanks in a csv, `Unnamed: 0` in a csv that pandas has read
and written, and `__index_level_0__` in parquet."""
_MISSING = {"", "#N/A", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""Texts that pandas reads as a missing value. Here they mean an unknown speaker."""
_COLUMN, _PATH, _SUBSET_AND_PATH, _ROW = range(4)
"""The forms of keys, by their origin: from the shortest to the one that never repeats."""
_MANIFEST_FIELDS = (
    *("key", "source", "target", "start", "audio_channel", "duration", "sample_rate", "sha256"),
    *("subset", "speaker"),
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
        self.root, self.data = root, data
        self._columns: dict[str, Columns] = {}
        refused: list[ConfigurationError] = []
        for file, subset in files.items():
            try:
                self._columns[file] = named_columns(file, data.columns)
            except ConfigurationError as error:
                # Corpora have other tables too, such as Common Voice's clip_durations.tsv and reported.tsv.
                if requested_splits(subset, data):
                    raise
                refused.append(error)
                self.notes = (*self.notes, f"{name_of(file)} is not read: {error}")
        if not self._columns:
            raise refused[0]
        self.files = {file: files[file] for file in self._columns}
        # A key column that was found by its usual name may have repeated values, and `refine_keys` then stops
        # using it. A column that the recipe names is always used.
        has_key = any(columns.key for columns in self._columns.values())
        self._key_form = _COLUMN if has_key and not data.columns.key else _PATH
        self.by_subset: dict[str, list[str]] = {}
        for file in self.files:
            for subset in self._subsets_of(file):
                self.by_subset.setdefault(subset, []).append(file)

    @classmethod
    def find(cls, root: str, data: Data) -> "Table | None":
        """Open the tables at a path; return None if the path has none.

        Raises:
            InputError: a file cannot be read as a table.
            ConfigurationError: a column is missing or ambiguous.
        """
        files = {file: split_of(file) or stem_of(file) for file in files_at(root, SUFFIXES)}
        return cls(root, files, data) if files else None

    def sources(self, subset: str) -> Iterator[str]:
        # Embedded audio is covered by its table's stamp, so such a table is not read here.
        files = [file for file in self.by_subset[subset] if not self._has_embedded_audio(file)]
        for item in self._rows(subset, files):
            if isinstance(item, Candidate) and item.content is None:
                yield item.source

    def items(self, subset: str) -> Iterator[Item]:
        return self._rows(subset, self.by_subset[subset])

    def _subsets_of(self, file: str) -> set[str]:
        column = self._columns[file].split
        if not column:
            return {self.files[file]}
        return {self._subset(file, number, cells) for number, cells in rows(file, [column])}

    def _subset(self, file: str, number: int, cells: dict[str, Any]) -> str:
        column = self._columns[file].split
        return _name(_cell(cells, column), f"{file}, row {number}", column, "split") or self.files[file]

    def _has_embedded_audio(self, file: str) -> bool:
        """Return whether the first row of a table contains audio itself instead of a file's path."""
        column = self._columns[file].audio
        _, cells = next(rows(file), (0, {}))
        return _audio(_cell(cells, column), f"{file}: the column {column}")[1] is not None

    def _rows(self, subset: str, files: Iterable[str]) -> Iterator[Item]:
        for file in files:
            for number, cells in rows(file):
                if self._subset(file, number, cells) == subset:
                    yield self._candidate(file, number, cells, subset)

    def _candidate(self, file: str, number: int, cells: dict[str, Any], subset: str) -> Item:
        columns, where = self._columns[file], f"{file}, row {number}"
        path, content = _audio(_cell(cells, columns.audio), f"{where}: the column {columns.audio}")
        start = _seconds(cells, columns.start, where)
        duration = None if start is None else _seconds(cells, columns.duration, where)
        own = _name(_cell(cells, columns.key), where, columns.key, "key")
        is_named = bool(self.data.columns.key)
        uses_column = is_named or self._key_form == _COLUMN
        key = own if uses_column else ""
        if uses_column and columns.key and not own and not path:
            raise InputError(f"{where} has no key: fill in its column, or remove the column.")
        # Embedded audio may lack a path. Only the row's number can then name it.
        if not key and (not path or self._key_form == _ROW):
            key = f"{subset}-{stem_of(file)}-{number:07d}"
        elif not key:
            # Rows with the same path are segments of one file, which their starts distinguish.
            key = os.path.splitext(path)[0] + ("" if start is None else f"-{start:.2f}")
            key = f"{subset}/{key}" if self._key_form == _SUBSET_AND_PATH else key
        text = _text(_cell(cells, columns.text), where, columns.text, "text")
        if content is None and not path:
            return Rejection(key, "", Reason.NO_AUDIO, f"{where} has no audio.")
        source = audio_path(path, file, self.data.audio_root) if content is None else path or where
        # A key from a column that the recipe names identifies the utterance, so another row with that key is
        # a duplicate. Otherwise the hash distinguishes embedded audio with the same name. Hashes of bytes
        # differ between Python processes, but these are used only in this one.
        identity = "" if own and is_named else f"{own}\0{source}\0{start}\0{hash(content)}"
        extra = {"subset": subset} | _speaker(_cell(cells, columns.speaker)) | _other_columns(cells, columns)
        if own and not uses_column and columns.key not in _MANIFEST_FIELDS:
            extra[columns.key] = cells[columns.key]
        return Candidate(key, source, text, extra, start, duration, content, identity=identity)

    def refine_keys(self) -> str:
        if self._key_form == _ROW:
            return ""
        self._key_form += 1
        column = next((columns.key for columns in self._columns.values() if columns.key), "")
        return {
            _PATH: f"the column {column} has the same value for different audio, so keys are made of the "
            "audio's path; --data.columns.key names another column",
            _SUBSET_AND_PATH: "the same path stands for different audio, so keys are made of subset and path",
            _ROW: "the same path stands for different audio in one subset, so keys are made of the subset, "
            "the table's name and the row's number",
        }[self._key_form]


def split_of(file: str) -> str:
    """Return a file's name without suffix and number: `train-00000-of-00004.parquet` → `train`.

    The result is empty for a name that is only a number, such as `0000.parquet`.
    """
    return _FILE_NUMBER.sub("", stem_of(file))


def named_columns(file: str, columns: Columns) -> Columns:
    """Find the column of each role, from the recipe or by a usual name. A role without a column is empty.

    Raises:
        ConfigurationError: a named or required column is missing, several columns fit one role (other than
            the speaker's), one column has several roles, or two columns have the same name.
    """
    available = columns_of(file)
    if twice := next((name for name in available if name and available.count(name) > 1), None):
        raise ConfigurationError(f"{file} has two columns called {twice}: rename one of them.")
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
    """Return the column with a usual name for a role; empty if an optional role has no such column."""
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

    A cell is one of the two, or a dictionary with both, as Hugging Face's `Audio` writes.
    """
    path, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else (cell, None)
    if isinstance(path, bytes):
        path, content = None, path
    if isinstance(cell, dict) and cell.get("array") is not None and content is None:
        raise InputError(
            f"{where} holds decoded samples (array), not a file: convert it with the datasets library's "
            "`cast_column` to `Audio()`, and save the dataset again."
        )
    is_audio = not isinstance(cell, dict) or "path" in cell or "bytes" in cell
    if not is_audio or not isinstance(path, str | None) or not isinstance(content, bytes | None):
        raise InputError(
            f"{where} is of type {type(cell).__name__}, neither a path nor an audio file's bytes: "
            "name the right column with --data.columns.audio."
        )
    return (path or "").strip(), content


def _cell(cells: dict[str, Any], column: str) -> Any:
    """Return the cell in a role's column; None if the role has no column, or the value is null or NaN."""
    value = cells.get(column) if column else None
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(cell: Any, where: str, column: str, role: str) -> str:
    """Return the text in a cell; empty if it is missing."""
    if not isinstance(cell, str | None):
        raise InputError(
            f"{where}: the column {column} holds {type(cell).__name__}, not text: name another column with "
            f"--data.columns.{role}."
        )
    return cell or ""


def _name(cell: Any, where: str, column: str, role: str) -> str:
    """Return the name in a cell, which may be a number; empty if it is missing or blank.

    If a column of whole numbers has missing values, pandas converts it to floats: 7 becomes 7.0.
    """
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int | float):
        cell = str(cell)
    return _text(cell, where, column, role).strip()


def _speaker(cell: Any) -> dict[str, str]:
    """Return the manifest's field `speaker`; empty if the speaker is unknown."""
    name = _name(cell, "", "", "speaker") if isinstance(cell, str | int | float) else ""
    return {} if name in _MISSING else {"speaker": name}


def _seconds(cells: dict[str, Any], column: str, where: str) -> float | None:
    if not column:
        return None
    try:
        value = float(cells.get(column))  # type: ignore[arg-type]  # None is a TypeError
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(
            f"{where}: {column} must be a number of seconds, not {str(cells.get(column))[:40]!r}."
        )
    return value


def _other_columns(cells: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the cells to copy to the manifest: texts and finite numbers in columns without a role."""
    excluded = {*vars(columns).values(), *_MANIFEST_FIELDS}
    return {
        name: value
        for name, value in cells.items()
        if name not in excluded
        and not _UNNAMED.fullmatch(name)
        and isinstance(value, str | int | float)
        and value == value  # not NaN
        and value not in ("", math.inf, -math.inf)
    }
