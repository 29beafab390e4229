"""Local files: their paths, atomic writing, and SHA-256 digests."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from slam_asr.errors import StorageError
from slam_asr.storage.address import PathOrUri

FILE_URI = re.compile(r"file:(//(localhost(?=/))?|(?=/))")
"""Matches what comes before the path in `file:///a`, `file://localhost/a` and `file:/a` (RFC 8089)."""
PARTIAL = ".partial"
"""Suffix of the names of temporary files."""


def local_path(path: PathOrUri) -> Path:
    """Return the local path that a user's input denotes: `~` is expanded, and a file URI becomes its path.

    In a URI, `%20` stands for a space (RFC 3986, section 2.1).

    Raises:
        StorageError: the path is a URI of another scheme, or names an unknown user's home folder.
    """
    text = os.fspath(path)
    # The part before an @ may hold a password.
    shown = re.sub(r"://.*@", "://...@", text)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
    if scheme and scheme[1] == "s3":
        raise StorageError(f"{shown} is in object storage, but a local path is needed here: give one.")
    if scheme and scheme[1] != "file":
        raise StorageError(
            f"{shown}: the scheme {scheme[1]}:// is not supported; give a local path or s3://bucket/key."
        )
    if uri := FILE_URI.match(text):
        text = unquote(text[uri.end() :], errors="surrogateescape")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{text}: this user's home folder is not known; give a full path.") from error


@contextlib.contextmanager
def errors_naming(path: PathOrUri) -> Iterator[None]:
    """Let an `OSError` of the block name this path. By itself, it may name no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_path(path: Path) -> Path:
    """Return a path for the unfinished version of a file, in the same folder and unique to this thread."""
    # File names have at most 255 bytes; 50 characters take at most 200.
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")


def write_atomically(
    path: PathOrUri, content: bytes | memoryview | str | Iterable[bytes], replace: bool = True
) -> bool:
    """Write a file: write a temporary one, flush it to disk, and rename it.

    A reader never sees part of the content. After a crash, the previous file, if any, is unchanged.

    Args:
        path: the file's path; its folder is created.
        content: bytes; text, which is written as UTF-8; or an iterable of bytes, which is written to the
            temporary file piece by piece, so that memory need not hold all of it.
        replace: whether to replace an existing file.

    Returns:
        Whether the file was written. If `replace` is false, the first of several writers wins.

    Raises:
        OSError: the disk is full, the folder is not writable, or an iterable raised it; it names this path.
        StorageError: the path is not a local one.
    """
    path = local_path(path)
    temporary = temporary_path(path)
    try:
        with errors_naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # keeps `remove_abandoned` from removing it
                content = content.encode() if isinstance(content, str) else content
                file.writelines([content] if isinstance(content, bytes | memoryview) else content)
                file.flush()
                # Without this, a crash of the machine after the rename could leave an empty file.
                os.fsync(file.fileno())
                if replace:
                    os.replace(temporary, path)
                    return True
                # Unlike a rename, a link fails if the name exists.
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
                    return True
                return False
    finally:
        temporary.unlink(missing_ok=True)


def allow_readers(path: Path) -> None:
    """Let everyone who may read a folder also read the files in it.

    safetensors creates files that only their owner can read, but another user may run the next stage.

    Args:
        path: the folder; or a single file, and then only this file is changed.

    Raises:
        OSError: a file belongs to another user.
    """
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | file.parent.stat().st_mode & 0o444)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed processes left below a folder.

    `write_atomically` locks its file while it writes, so that file is not removed. Other writers of
    temporary files take no lock, so their files may be removed too.
    """
    for temporary in folder.rglob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError), open(temporary, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was just created may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > 1:
                temporary.unlink(missing_ok=True)


def write_json(path: PathOrUri, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(path: PathOrUri) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-serialisable value, in hexadecimal. The order of keys does not matter."""
    # Python represents a file name that is not UTF-8 with lone surrogates, which strict UTF-8 refuses.
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
