"""What programs do with files, the same for a local path and for `s3://bucket/key`."""

import contextlib
import fcntl
import io
import os
import posixpath
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slam_asr.errors import UserError
from slam_asr.storage import s3
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.local import aside_of, digest, local_path, write_atomically
from slam_asr.storage.s3 import is_s3

_PARALLEL_FILES = 8


@dataclass(frozen=True)
class Info:
    """What is known of a file without opening it."""

    name: str
    """Path below the folder that was walked, with slashes; the last part of it where one file was asked for."""
    bytes: int
    stamp: str
    """Changes with the content: the time of change in ns, or the object's etag."""


def join(base: str | os.PathLike, *names: str) -> str:
    """A path below another one."""
    base = os.fspath(base)
    if is_s3(base):
        return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])
    return os.path.join(base, *names)


def parent_of(path: str | os.PathLike) -> str:
    """The folder in which a file lies."""
    path = os.fspath(path)
    return (
        path.rstrip("/").rpartition("/")[0]
        if is_s3(path)
        else os.path.dirname(os.path.abspath(local_path(path)))
    )


def name_of(path: str | os.PathLike) -> str:
    """The last part of a path."""
    return posixpath.basename(os.fspath(path).rstrip("/"))


def resolve(path: str | os.PathLike, folder: str) -> str:
    """An absolute path or URI: a relative one counts from `folder`.

    In object storage, `..` is resolved and never leaves the bucket.
    """
    path = os.fspath(path)
    if "://" in path:
        return path
    if is_s3(folder) and not os.path.isabs(path):
        bucket, prefix = s3.split_uri(folder)
        inside = posixpath.normpath(posixpath.join("/", prefix, path)).lstrip("/")
        return f"s3://{bucket}/{inside}"
    return os.path.normpath(os.path.join("/" if is_s3(folder) else folder, path))


def info(path: str | os.PathLike) -> Info | None:
    """What is known of a file, or None where there is no such file.

    Raises:
        UserError: object storage cannot be used.
    """
    path = os.fspath(path)
    if is_s3(path):
        found = s3.head(path)
        return Info(name_of(path), found.bytes, found.etag) if found else None
    file = local_path(path)
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Info(file.name, status.st_size, str(status.st_mtime_ns)) if file.is_file() else None


def exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file."""
    return info(path) is not None


def walk(root: str | os.PathLike) -> Iterator[Info]:
    """All files below a folder or prefix, by name, in the order of their names' bytes; none where there is nothing.

    Names are read as they are needed, so that a million of them take no memory.

    Raises:
        UserError: object storage cannot be used.
    """
    root = os.fspath(root)
    if is_s3(root):
        prefix = s3.split_uri(root)[1].rstrip("/")
        for found in s3.list_objects(root):
            name = found.key.removeprefix(prefix).lstrip("/")
            if name and not name.endswith("/"):
                yield Info(name, found.bytes, found.etag)
    elif local_path(root).is_dir():
        yield from _walk_folder(local_path(root), "")


def _walk_folder(folder: Path, above: str) -> Iterator[Info]:
    with os.scandir(folder) as entries:
        # A folder's name counts with its slash, as it does in an object's key.
        ordered = sorted((os.fsencode(e.name) + b"/" * e.is_dir(), e) for e in entries)
    for _, entry in ordered:
        if entry.is_dir():
            yield from _walk_folder(Path(entry.path), f"{above}{entry.name}/")
        elif entry.is_file():
            try:
                status = entry.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            yield Info(above + entry.name, status.st_size, str(status.st_mtime_ns))


def folders_in(root: str | os.PathLike) -> list[str]:
    """Names of the folders right below a folder or prefix, in order."""
    root = os.fspath(root)
    if is_s3(root):
        return sorted(s3.list_folders(root))
    folder = local_path(root)
    return sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []


def names_in(root: str | os.PathLike) -> list[str]:
    """Names of the files right in a folder or prefix, in order."""
    root = os.fspath(root)
    if is_s3(root):
        return [name_of(found.key) for found in s3.list_files(root)]
    folder = local_path(root)
    return sorted(f.name for f in folder.iterdir() if f.is_file()) if folder.is_dir() else []


def read_bytes(path: str | os.PathLike) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: there is no such local file.
        UserError: an object that is not there, or cannot be read.
    """
    path = os.fspath(path)
    return s3.read(path) if is_s3(path) else local_path(path).read_bytes()


def open_stream(path: str | os.PathLike) -> BinaryIO:
    """A file opened for reading from start to end; an object is read in ranges that are tried again when they fail.

    Raises:
        FileNotFoundError: there is no such local file.
        UserError: an object that is not there, or cannot be read.
    """
    path = os.fspath(path)
    if is_s3(path):
        return io.BufferedReader(s3.ObjectStream(path), buffer_size=8 * 2**20)
    return open(local_path(path), "rb")


def write_bytes(path: str | os.PathLike, content: bytes | memoryview | str, replace: bool = True) -> bool:
    """Write a file or object whole or not at all.

    Returns:
        Whether it was written: without `replace`, the first of several writers wins.

    Raises:
        UserError: object storage cannot be used.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return write_atomically(local_path(path), content, replace)
    try:
        s3.write(path, content.encode() if isinstance(content, str) else content, only_if_absent=not replace)
    except s3.AlreadyThere:
        return False
    return True


def upload(file: str | os.PathLike, path: str | os.PathLike) -> None:
    """Publish a local file under a path or URI, whole or not at all."""
    path = os.fspath(path)
    if is_s3(path):
        with open(file, "rb") as stream:
            s3.upload(path, stream)
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(target)
    try:
        shutil.copyfile(file, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def delete(path: str | os.PathLike) -> None:
    """Remove a file or object; one that is not there already is gone."""
    path = os.fspath(path)
    if is_s3(path):
        s3.remove(path)
    else:
        local_path(path).unlink(missing_ok=True)


def fetch(path: str | os.PathLike) -> Path:
    """A local file with the content of a file or object; an object is fetched once, and again when it changes.

    Raises:
        OSError: the disk is full, or fails.
        UserError: an object that is not there, or cannot be read.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return local_path(path)
    known = s3.head(path)
    if known is None:
        raise UserError(f"There is no object {path}: check the address.")
    target = _kept([path, known.etag], path)
    if not target.is_file():
        with _alone_with(target):
            if not target.is_file():
                aside = target.with_name(f".{target.name}.partial")
                _download(path, aside, known)
                os.replace(aside, target)
    return target


def fetch_folder(path: str | os.PathLike) -> Path:
    """A local folder with all files below a folder or prefix; fetched once, and again when any of them changes.

    Raises:
        OSError: the disk is full, or fails.
        UserError: there is nothing below that prefix, or it cannot be read.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return local_path(path)
    files = list(walk(path))
    if not files:
        raise UserError(f"There is nothing at {path}: check the bucket and the prefix.")
    folder = _kept([path.rstrip("/"), [[f.name, f.bytes, f.stamp] for f in files]], path)
    if not folder.is_dir():
        with _alone_with(folder):
            if not folder.is_dir():
                aside = folder.with_name(f".{folder.name}.partial")
                _download_folder(path, files, aside)
                os.rename(aside, folder)
    return folder


def _kept(known: list, path: str) -> Path:
    """Where in the cache something is kept, by all that is known of it; under its own name, for people and for its suffix."""
    name = os.fsencode(name_of(path))[-200:].decode(errors="ignore")
    return cache_folder() / "objects" / digest(known)[:24] / name


@contextlib.contextmanager
def _alone_with(target: Path) -> Iterator[None]:
    """Let one process, or thread, fetch, and the others wait for it; what a killed one left is begun anew."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(uri: str, aside: Path, known: s3.Object | None = None) -> None:
    """Fetch an object; a failure leaves nothing."""
    try:
        with open(aside, "w+b") as file:
            s3.download(uri, file, known=known)
            # Before it gets its name, by which its content is taken for granted even after a crash of the machine.
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _download_folder(path: str, files: list[Info], aside: Path) -> None:
    """Fetch files below a prefix into a new folder; a failure leaves nothing."""
    shutil.rmtree(aside, ignore_errors=True)
    prefix = s3.split_uri(path)[1].rstrip("/")
    for file in files:
        if not (aside / file.name).resolve().is_relative_to(aside.resolve()):
            raise UserError(
                f"{path} holds an object whose name is_coordinator out of its folder, {file.name}: it is not fetched."
            )

    def one(file: Info) -> None:
        (aside / file.name).parent.mkdir(parents=True, exist_ok=True)
        # What was listed saves asking for each: an object that was replaced since is refused by its etag, and asked for anew.
        known = s3.Object(f"{prefix}/{file.name}".lstrip("/"), file.bytes, file.stamp)
        _download(join(path, file.name), aside / file.name, known)

    try:
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            list(pool.map(one, files))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish_folder(folder: Path, path: str, last: str) -> None:
    """Upload all files of a local folder below a prefix; `last` after all others, so that it vouches for them."""
    files = [f.name for f in walk(folder) if f.name != last and not name_of(f.name).startswith(".")]
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(lambda name: upload(folder / name, join(path, name)), files))
    upload(folder / last, join(path, last))
