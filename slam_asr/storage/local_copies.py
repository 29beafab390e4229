"""Local copies of objects and prefixes, and other files of the cache that are made only once."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slam_asr.errors import StorageError
from slam_asr.storage.address import PathOrUri, is_s3
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.downloads import download
from slam_asr.storage.local import PARTIAL, digest, local_path
from slam_asr.storage.locks import exclusive
from slam_asr.storage.objects import Info, require_object
from slam_asr.storage.paths import PARALLEL_FILES, join, name_of, walk

_MAX_NAME_BYTES = 200
"""Less than the 255 bytes that a file name may have, because a temporary file has a longer name."""


def fetch(path: PathOrUri) -> Path:
    """Return the path of a local file with the content of a file or object.

    An object is fetched into the cache once, and again when it changes. A local file is not copied.

    Raises:
        OSError: the local disk is full, or fails.
        StorageError: the object does not exist, or cannot be read.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return local_path(path)
    known = require_object(path)
    return _cached(path, [path, known.stamp], lambda temporary: _download(path, temporary, known))


def fetch_folder(path: PathOrUri) -> Path:
    """Return the path of a local folder with all files below a folder or prefix.

    A prefix is fetched into the cache once, and again when any of its objects changes. A local folder is not
    copied.

    Raises:
        OSError: the local disk is full, or fails.
        StorageError: nothing exists below the prefix, an object cannot be read, or its name leaves the
            folder.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return local_path(path)
    files = list(walk(path))
    if not files:
        raise StorageError(f"There is nothing at {path}: check the bucket and the prefix.")
    identity: list[object] = [path.rstrip("/"), [[f.name, f.bytes, f.stamp] for f in files]]
    return _cached(path, identity, lambda temporary: _download_folder(path, files, temporary))


def _cached(path: str, identity: list[object], fill: Callable[[Path], None]) -> Path:
    """Return the path of a cached file or folder, which is fetched if it is not there yet.

    Args:
        path: the file's or folder's URI. Its last part becomes the local name, for people and for libraries
            that look at the suffix.
        identity: address and version of the content; its digest is the name of the parent folder.
        fill: a function that fetches the content to a temporary path.
    """
    # A name that is too long loses its beginning, so that it retains its suffix.
    name = os.fsencode(name_of(path))[-_MAX_NAME_BYTES:].decode(errors="ignore")
    if name in (".", ".."):  # an object can have this name, but a file cannot
        name = "object"
    return make_once(cache_folder() / "objects" / digest(identity)[:24] / name, fill)


def make_once(
    target: Path,
    fill: Callable[[Path], object],
    exists: Callable[[Path], bool] = Path.exists,
    while_waiting: str = "",
) -> Path:
    """Make a file or folder of the cache unless it exists; only one process or thread at a time does so.

    Args:
        target: the file or folder.
        fill: a function that creates the content at the temporary path that it is given. The path is then
            renamed to `target`.
        exists: whether the target is there and complete. If it is not, whatever is there is replaced.
        while_waiting: line for the log if another process or thread is making it; empty for none.

    Returns:
        `target`.
    """
    if not exists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(f".{target.name}.lock"), while_waiting):
            # Another process may have made it while this one waited.
            if not exists(target):
                temporary = target.with_name(f".{target.name}{PARTIAL}")
                _remove(temporary)  # a killed process may have left it
                try:
                    fill(temporary)
                    _remove(target)
                    os.rename(temporary, target)
                except BaseException:
                    _remove(temporary)
                    raise
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _download(uri: str, target: Path, known: Info) -> None:
    with open(target, "w+b") as file:
        download(uri, file, known=known)
        # Flushed to disk, because a renamed file is trusted even after a crash of the machine.
        os.fsync(file.fileno())


def _download_folder(path: str, files: list[Info], folder: Path) -> None:
    """Fetch the files below a prefix into a folder, which is created."""
    for file in files:
        if not (folder / file.name).resolve().is_relative_to(folder.resolve()):
            raise StorageError(
                f"{path} holds an object whose name points outside its folder, {file.name}: "
                "it is not fetched."
            )

    def fetch_one(file: Info) -> None:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        # The metadata from the listing save one request per object. If an object has been replaced since, its
        # etag does not match, and the download requests its metadata after all.
        _download(join(path, file.name), target, file)

    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        list(pool.map(fetch_one, files))
