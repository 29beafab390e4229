"""Tables row by row: csv, tsv, JSON lines, parquet, and the arrow files that Hugging Face datasets are saved as."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slam_asr.errors import UserError
from slam_asr.storage import fetch, open_stream

TEXT_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")

_FEW, _MANY = 32, 4096
"""Rows that are decoded at once: where their cells may hold audio, and where they do not."""
_BUFFER = 2**20
"""Bytes of a parquet column that are read ahead; without a buffer, a whole row group would be in memory."""

Row = tuple[int, dict[str, Any]]
"""Its number in the file, counted as a person would, and its cells."""


def columns_of(path: str) -> list[str]:
    """The names of a table's columns.

    Raises:
        UserError: it cannot be read as a table.
    """
    suffix = _suffix(path)
    if suffix in ("parquet", "arrow"):
        with _arrow_told(path):
            return _schema(path).names
    if suffix == "jsonl":
        return list(next(_json_rows(path), (0, {}))[1])
    return _header(path)[0]


def rows(path: str, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a table on local disk or in object storage, in order.

    Args:
        path: its suffix says what it is.
        columns: those that are wanted, where the format can leave out others.

    Raises:
        UserError: a row cannot be read, by file and line.
    """
    suffix = _suffix(path)
    if suffix in ("parquet", "arrow"):
        return _arrow_rows(path, columns)
    return _json_rows(path) if suffix == "jsonl" else _text_rows(path)


def _text(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_stream(path), encoding="utf-8-sig", newline="")


def _suffix(path: str) -> str:
    return path.lower().rpartition(".")[2]


def _header(path: str) -> tuple[list[str], dict[str, Any]]:
    """A table's columns, and how its cells are separated."""
    with _text_told(path, 1), _text(path) as file:
        line = file.readline()
        if _suffix(path) == "tsv":
            # Written by hand as often as by a csv library: a quote may be just a quote.
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        else:
            dialect = {"delimiter": ";" if ";" in line and "," not in line else ",", "strict": True}
        return [name.strip() for name in next(csv.reader([line], **dialect), [])], dialect


def _text_rows(path: str) -> Iterator[Row]:
    names, dialect = _header(path)
    with _text(path) as file:
        lines = csv.reader(file, **dialect)
        while True:
            with _text_told(path, lines.line_num + 1):
                cells = next(lines, None)
            if cells is None:
                return
            if lines.line_num == 1 or not cells:
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}, line {lines.line_num} has {len(cells)} cells where the header has {len(names)}: mend that line."
                )
            yield (
                lines.line_num,
                dict(zip(names, map(_unquoted, cells) if "quoting" in dialect else cells, strict=True)),
            )


@contextlib.contextmanager
def _text_told(path: str, line: int) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}, near line {line}): write it anew as UTF-8."
        ) from error
    except csv.Error as error:
        raise UserError(f"{path}, line {line}, cannot be read as a table ({error}): mend it.") from error


def _unquoted(cell: str) -> str:
    """A cell that a csv library has quoted, as it was."""
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell


def _json_rows(path: str) -> Iterator[Row]:
    with open_stream(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                cells = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}): each line must be one JSON object."
                ) from error
            if not isinstance(cells, dict):
                raise UserError(
                    f"{path}, line {number} holds {type(cells).__name__} where an object must stand."
                )
            yield number, cells


@contextlib.contextmanager
def _arrow_told(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as {_suffix(path)} ({why}): was it copied whole?") from error


def _schema(path: str) -> Any:
    if _suffix(path) == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(fetch(path))
    with _opened_arrow(fetch(path)) as batches:
        return batches.schema


def _arrow_rows(path: str, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow

    with _arrow_told(path):
        schema = _schema(path)
        wanted = [name for name in schema.names if columns is None or name in columns]
        heavy = any(
            pyarrow.types.is_nested(schema.field(n).type) or _is_bytes(schema.field(n).type) for n in wanted
        )
        at_once = _FEW if heavy else _MANY
        number = 0
        for batch in _batches(fetch(path), wanted, at_once):
            for start in range(0, batch.num_rows, at_once):
                for cells in batch.slice(start, at_once).to_pylist():
                    number += 1
                    yield number, cells


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _batches(file: Path, wanted: list[str], at_once: int) -> Iterator[Any]:
    """Record batches with these columns."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        # Read ahead by pyarrow itself, all that went by would stay in memory.
        with pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            yield from table.iter_batches(batch_size=at_once, columns=wanted, use_threads=False)
        return
    with _opened_arrow(file) as batches:
        for batch in batches:
            yield batch.select(wanted)


def _opened_arrow(file: Path) -> Any:
    """An arrow file's batches: the datasets library writes streams, other programs files."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return _FileBatches(pyarrow.ipc.open_file(source))


class _FileBatches:
    """An arrow file read as a stream is."""

    def __init__(self, file: Any) -> None:
        self._file, self.schema = file, file.schema

    def __enter__(self) -> "_FileBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return (self._file.get_batch(i) for i in range(self._file.num_record_batches))
