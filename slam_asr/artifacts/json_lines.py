"""Writes files of JSON lines, line by line. A file becomes visible only when it is complete."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slam_asr.storage import PathOrUri, is_s3, local_path, name_of, upload
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.local import temporary_path


def write_json_lines(path: PathOrUri, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically, as `write_lines` does."""
    write_lines(path, map(json_line, rows))


def json_line(row: dict[str, Any]) -> bytes:
    """Format a JSON object as one line.

    A file name that is not UTF-8, which Python represents with lone surrogates, is escaped. It is read back
    as the same name.
    """
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_lines(path: PathOrUri, lines: Iterable[bytes]) -> None:
    """Write lines to a local file or an object as they arrive. The file is visible only when it is complete.

    Raises:
        OSError: the disk is full, or the folder is not writable.
        StorageError: object storage cannot be written.
    """
    partial = temporary_path(temporary_folder(path) / name_of(path))
    try:
        with open(partial, "wb") as file:
            file.writelines(lines)
            file.flush()
            if not is_s3(path):
                os.fsync(file.fileno())
        if is_s3(path):
            upload(partial, path)
        else:
            os.replace(partial, local_path(path))
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        # The user knows the file's own name, but not the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def temporary_folder(path: PathOrUri) -> Path:
    """Return the folder for a file that is being written: its own folder, or the cache for an object."""
    folder = cache_folder() / "work" if is_s3(path) else local_path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder
