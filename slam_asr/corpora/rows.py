"""Reads tables row by row: csv, tsv, JSON lines, parquet, and the arrow files of Hugging Face datasets."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from slam_asr.errors import InputError
from slam_asr.storage import fetch, open_stream

if TYPE_CHECKING:
    import pyarrow

TEXT_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
"""Suffixes of the files that `Table.find` looks for. This module also reads arrow files, for Hugging Face
datasets, and JSON lines, for them and for Lhotse."""

_ROWS_WITH_AUDIO, _ROWS_WITHOUT_AUDIO = 32, 4096
"""Numbers of rows that are decoded at once, in tables with and without cells that may contain audio.

Larger numbers are faster but need more memory.
"""
_BUFFER = 2**20
"""Bytes of a parquet column that are read at once. Without a buffer, pyarrow would read complete row groups
into memory."""
_MAX_LINE = 2**26
"""Maximum length of a line of JSON in bytes. Without it, a small compressed file could fill the memory: a
line of zeros grows a thousandfold when it is decompressed."""

Row = tuple[int, dict[str, Any]]
"""A row's number in the file, from 1, and its cells by column. In text files it is the number of a line."""


def columns_of(path: str) -> list[str]:
    """Return the names of a table's columns, except columns of dates and times in parquet and arrow.

    Dates and times are not used, and pyarrow needs pandas to convert some of them.

    Raises:
        InputError: the file cannot be read as a table.
    """
    suffix = _suffix(path)
    if suffix in ("parquet", "arrow"):
        with _arrow_errors_as_input_error(path):
            return [column.name for column in _arrow_columns(path)]
    if suffix == "jsonl":
        # A field may be missing in the first line and present in others.
        return list(dict.fromkeys(name for _, cells in json_rows(path) for name in cells))
    return _header(path)[0]


def rows(path: str, columns: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a table on local disk or in object storage, in order.

    Args:
        path: path or URI of the table; its suffix decides the format.
        columns: columns to read; None for all. Text formats and JSON lines always give all columns.

    Raises:
        InputError: a row cannot be read.
    """
    suffix = _suffix(path)
    if suffix in ("parquet", "arrow"):
        return _arrow_rows(path, columns)
    return json_rows(path) if suffix == "jsonl" else _text_rows(path)


def _text(path: str) -> io.TextIOWrapper:
    # utf-8-sig removes the byte order mark that Excel writes. Line ends are not translated, because csv must
    # see the line ends within quoted cells.
    return io.TextIOWrapper(open_stream(path), encoding="utf-8-sig", newline="")


def _suffix(path: str) -> str:
    return path.lower().rpartition(".")[2]


def _header(path: str) -> tuple[list[str], dict[str, Any]]:
    """Return the columns of a csv or tsv file, and the arguments of `csv.reader` for its rows."""
    with _text_errors_as_input_error(path, 1), _text(path) as file:
        line = file.readline()
        if _suffix(path) == "tsv":
            # Many tsv files are not written by a csv library, so a quote may be part of the text.
            dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        else:
            # Without `strict`, csv would read a quote that is never closed as one cell up to the file's end.
            dialect = {"delimiter": ";" if ";" in line and "," not in line else ",", "strict": True}
        return [name.strip() for name in next(csv.reader([line], **dialect), [])], dialect


def _text_rows(path: str) -> Iterator[Row]:
    names, dialect = _header(path)
    with _text(path) as file:
        lines = csv.reader(file, **dialect)
        while True:
            with _text_errors_as_input_error(path, lines.line_num + 1):
                cells = next(lines, None)
            if cells is None:
                return
            if lines.line_num == 1 or not cells:
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"{path}, line {lines.line_num} has {len(cells)} cells, but the header has {len(names)}: "
                    "correct that line."
                )
            if "quoting" in dialect:
                cells = [_unquoted(cell) for cell in cells]
            yield lines.line_num, dict(zip(names, cells, strict=True))


@contextlib.contextmanager
def _text_errors_as_input_error(path: str, line: int) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason}, near line {line}): convert it to UTF-8."
        ) from error
    except csv.Error as error:
        raise InputError(f"{path}, line {line}, cannot be read as a table ({error}): correct it.") from error


def _unquoted(cell: str) -> str:
    """Return the text of a tsv cell. If a csv library quoted the cell, the quotes are removed."""
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell


def json_rows(path: str) -> Iterator[Row]:
    """Yield the objects of a file of JSON lines, which may be compressed with gzip.

    Raises:
        InputError: a line is not a JSON object, or the file is damaged.
    """
    number = 0
    try:
        with _maybe_compressed(path) as lines:
            # `readline` may fail too, so the number is set before it is called.
            for number in itertools.count(1):
                line = lines.readline(_MAX_LINE)
                if not line:
                    return
                if len(line) == _MAX_LINE:
                    raise ValueError(f"it is longer than {_MAX_LINE // 2**20} MiB")
                if line.isspace():
                    continue
                cells = json.loads(line)
                if not isinstance(cells, dict):
                    raise InputError(
                        f"{path}, line {number} is of type {type(cells).__name__}: it must be an object."
                    )
                yield number, cells
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}, line {number} cannot be read as JSON ({error}): check that each line is one JSON "
            "object, and that the file was copied completely."
        ) from error


def _maybe_compressed(path: str) -> BinaryIO:
    stream = open_stream(path)
    return io.BufferedReader(gzip.GzipFile(fileobj=stream)) if path.lower().endswith(".gz") else stream


@contextlib.contextmanager
def _arrow_errors_as_input_error(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        # An OSError with an error number comes from the disk. pyarrow raises an OSError without a number for
        # a damaged file, and a ValueError for text that is not UTF-8.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path} cannot be read as {_suffix(path)} ({reason}): check that it was copied completely."
        ) from error


def _arrow_columns(path: str) -> list["pyarrow.Field"]:
    """Return the columns of a parquet or arrow file, except those of dates and times."""
    import pyarrow.parquet

    file = fetch(path)
    schema = pyarrow.parquet.read_schema(file) if _suffix(path) == "parquet" else _open_arrow(file)[0]
    return [column for column in schema if not pyarrow.types.is_temporal(column.type)]


def _arrow_rows(path: str, columns: list[str] | None) -> Iterator[Row]:
    with _arrow_errors_as_input_error(path):
        used = [column for column in _arrow_columns(path) if columns is None or column.name in columns]
        batch_rows = _ROWS_WITH_AUDIO if any(map(_may_have_audio, used)) else _ROWS_WITHOUT_AUDIO
        number = 0
        for batch in _batches(fetch(path), [column.name for column in used], batch_rows):
            # An arrow file's batches may be large, and `to_pylist` copies all audio of its rows at once.
            for start in range(0, batch.num_rows, batch_rows):
                for cells in batch.slice(start, batch_rows).to_pylist():
                    number += 1
                    yield number, cells


def _may_have_audio(column: "pyarrow.Field") -> bool:
    from pyarrow import types

    kind = column.type
    return types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _batches(file: Path, columns: list[str], batch_rows: int) -> Iterator["pyarrow.RecordBatch"]:
    """Yield record batches of these columns. `batch_rows` limits the batches of parquet, but not of arrow."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        # With pre_buffer, pyarrow would retain in memory everything that it has read.
        with pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            yield from table.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False)
        return
    for batch in _open_arrow(file)[1]:
        yield batch.select(columns)


def _open_arrow(file: Path) -> tuple["pyarrow.Schema", Iterator["pyarrow.RecordBatch"]]:
    """Open an arrow file of either format; return its columns and its batches.

    The datasets library writes arrow's stream format; other programs write its file format.
    """
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:
        batches = pyarrow.ipc.open_file(source)
        return batches.schema, (batches.get_batch(i) for i in range(batches.num_record_batches))
