"""Files on disk that are visible whole or not at all, and the digests that name them."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from slam_asr.errors import UserError

PARTIAL = ".partial"


def local_path(path: str | os.PathLike) -> Path:
    """The local path behind what the user typed.

    Raises:
        UserError: for a URI of a scheme that is not read here.
    """
    text = os.fspath(path)
    # What stands before an @ may be a password.
    shown = re.sub(r"://.*@", "://...@", text)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
    if scheme and scheme[1] == "s3":
        raise UserError(f"{shown} lies in object storage, and a local path is needed here: give one.")
    if scheme and scheme[1] != "file":
        raise UserError(
            f"{shown}: paths of the scheme {scheme[1]}:// cannot be read; give a local path or s3://bucket/key."
        )
    try:
        return Path(text.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such user's home folder; give a full path.") from error


def aside_of(path: Path) -> Path:
    """A name beside a file for what is not finished, that no other thread or process uses."""
    # 255 bytes at most, were all its letters of four.
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.partial")


def write_atomically(
    path: str | os.PathLike, content: bytes | memoryview | str, replace: bool = True
) -> bool:
    """Write a file aside, flush it to disk, and rename it into place.

    A reader never sees a part of it, and a crash leaves the older file, if there was one.

    Args:
        path: of the file; its folder is made.
        content: text is written as UTF-8.
        replace: whether a file that is there already is replaced.

    Returns:
        Whether it was written: without `replace`, the first of several writers wins.
    """
    path = Path(path)
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells `remove_abandoned` that somebody is at it
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            if replace:
                os.replace(aside, path)
                return True
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
                return True
            return False
    except OSError as error:
        # The name the user knows, not the one aside.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written below a folder; what is being written is locked, and stays."""
    for aside in folder.rglob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError), open(aside, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > 1:  # not one that is just about to be locked
                aside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest(value: Any) -> str:
    """The SHA-256 of a JSON-able value, independent of the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
