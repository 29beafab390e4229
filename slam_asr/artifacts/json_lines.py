"""Writes files of JSON lines, line by line."""

import json
from collections.abc import Iterable
from typing import Any

from slam_asr.storage import PathOrUri, write_atomically


def write_json_lines(path: PathOrUri, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line to a local file, atomically (see `write_atomically`)."""
    write_atomically(path, map(json_line, rows))


def json_line(row: dict[str, Any]) -> bytes:
    """Format a JSON object as one line.

    A file name that is not UTF-8, which Python represents with lone surrogates, is escaped. It is read back
    as the same name.
    """
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
