"""File operations that work in the same way for local paths and for `s3://bucket/key`."""

import errno
import os
import posixpath
import shutil
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from slam_asr.errors import StorageError
from slam_asr.storage import objects, uploads
from slam_asr.storage.address import PathOrUri, is_s3, split_uri
from slam_asr.storage.local import FILE_URI, errors_naming, local_path, temporary_path, write_atomically
from slam_asr.storage.objects import Info

PARALLEL_FILES = 8


def join(base: PathOrUri, *names: str) -> str:
    """Join a base path or URI and the names below it."""
    base = os.fspath(base)
    if is_s3(base):
        return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])
    return os.path.join(base, *names)


def parent_of(path: PathOrUri) -> str:
    """Return the folder of a file, as an absolute path or URI. A bucket is its own folder."""
    path = os.fspath(path)
    if is_s3(path):
        folder = path.rstrip("/").rpartition("/")[0]
        # In `s3://bucket`, the last slash belongs to the scheme.
        return folder if folder != "s3:/" else path
    return os.path.dirname(os.path.abspath(local_path(path)))


def name_of(path: PathOrUri) -> str:
    """Return the last part of a path."""
    return posixpath.basename(os.fspath(path).rstrip("/"))


def resolve(path: PathOrUri, folder: str) -> str:
    """Make a path an absolute path or URI. A relative path is relative to `folder`, a path or URI.

    In object storage, `..` is resolved and never leaves the bucket.
    """
    path = os.fspath(path)
    if "://" in path or FILE_URI.match(path):
        return path
    if is_s3(folder) and not os.path.isabs(path):
        bucket, prefix = split_uri(folder)
        key = posixpath.normpath(posixpath.join("/", prefix, path)).lstrip("/")
        return f"s3://{bucket}/{key}"
    return os.path.normpath(os.path.join("/" if is_s3(folder) else folder, path))


def info(path: PathOrUri) -> Info | None:
    """Return the metadata of a file, or None if it does not exist or is a folder.

    Raises:
        StorageError: object storage cannot be read.
    """
    path = os.fspath(path)
    if is_s3(path):
        return objects.head(path)
    file = local_path(path)
    try:
        status = file.stat()
    except OSError as error:
        # ELOOP: a link that leads to itself.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return Info(file.name, status.st_size, str(status.st_mtime_ns)) if is_file else None


def exists(path: PathOrUri) -> bool:
    """Return whether a file or object exists. Folders do not count.

    Raises:
        StorageError: object storage cannot be read.
    """
    return info(path) is not None


def walk(root: PathOrUri) -> Iterator[Info]:
    """Yield all files below a folder or prefix, sorted by the bytes of their names.

    If the folder does not exist, nothing is yielded.

    Links are followed, except those that lead to a folder above them: following such a link would never end.
    Folders are read one after another, and object storage page by page, so a listing of a million files
    needs little memory, unless they are all in one local folder.

    Raises:
        StorageError: object storage cannot be read.
    """
    root = os.fspath(root)
    if is_s3(root):
        yield from objects.list_objects(root)
    elif local_path(root).is_dir():
        parents = Path(os.path.realpath(local_path(root))).parents
        yield from _walk_folder(local_path(root), "", frozenset(map(_identity, parents)))


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and inode of a folder, which are the same under all of its names."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _walk_folder(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Info]:
    """Yield the files below a folder; none if the folder is a link to a folder above it.

    Args:
        folder: the folder to list.
        prefix: its path below the root, with a slash at the end; empty for the root.
        above: identities of the folders that contain the folder.
    """
    if (this := _identity(folder)) in above:
        return
    above |= {this}
    with os.scandir(folder) as entries:
        # A folder's name is sorted with its slash, as it is in an object's key.
        ordered = sorted((os.fsencode(e.name) + b"/" * e.is_dir(), e) for e in entries if not _is_loop(e))
    for _, entry in ordered:
        if entry.is_dir():
            yield from _walk_folder(Path(entry.path), f"{prefix}{entry.name}/", above)
        elif entry.is_file():
            try:
                status = entry.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            yield Info(prefix + entry.name, status.st_size, str(status.st_mtime_ns))


def _is_loop(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link that leads to itself."""
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
        raise
    return False


def folders_in(root: PathOrUri) -> list[str]:
    """Return the sorted names of the folders directly below a folder or prefix.

    Links to the folder itself, or to a folder that contains it, are left out.

    Raises:
        StorageError: object storage cannot be read.
    """
    names = names_in(root, folders=True)
    if is_s3(root):
        return names
    here = Path(os.path.realpath(local_path(root)))
    return [name for name in names if not here.is_relative_to(os.path.realpath(here / name))]


def names_in(root: PathOrUri, folders: bool = False) -> list[str]:
    """Return the sorted names of the files directly below a folder or prefix, or of the folders there.

    Raises:
        StorageError: object storage cannot be read.
    """
    root = os.fspath(root)
    if is_s3(root):
        return objects.list_names(root, folders)
    folder = local_path(root)
    if not folder.is_dir():
        return []
    return sorted(f.name for f in folder.iterdir() if (f.is_dir() if folders else f.is_file()))


def read_bytes(path: PathOrUri) -> bytes:
    """Read the content of a file or object.

    Raises:
        FileNotFoundError: the local file does not exist.
        StorageError: the object does not exist, or cannot be read.
    """
    path = os.fspath(path)
    return objects.read(path) if is_s3(path) else local_path(path).read_bytes()


def open_stream(path: PathOrUri) -> BufferedReader:
    """Open a file or object for reading from start to end. An object is read in ranges, each with retries.

    Raises:
        FileNotFoundError: the local file does not exist.
        StorageError: the object does not exist, or cannot be read.
    """
    path = os.fspath(path)
    if is_s3(path):
        return objects.open_object(path)
    return open(local_path(path), "rb")


def write_bytes(path: PathOrUri, content: bytes | memoryview | str, replace: bool = True) -> bool:
    """Write a file or object, which becomes visible only when it is complete.

    Args:
        path: path of the file or object; the folder of a local file is created.
        content: the content; text is written as UTF-8.
        replace: whether to replace an existing file or object.

    Returns:
        Whether the content was written. If `replace` is false, the first of several writers wins. Where the
        object storage has no conditional writes, the last of several simultaneous writers wins.

    Raises:
        OSError: the disk is full, or the folder is not writable.
        StorageError: object storage cannot be written.
    """
    path = os.fspath(path)
    if not is_s3(path):
        return write_atomically(local_path(path), content, replace)
    encoded = content.encode() if isinstance(content, str) else content
    return uploads.write(path, encoded, only_if_absent=not replace)


def upload(file: PathOrUri, path: PathOrUri) -> None:
    """Copy a local file to a path or URI, where it becomes visible only when it is complete.

    Raises:
        OSError: the disk is full, or fails.
        StorageError: object storage cannot be written.
    """
    path = os.fspath(path)
    if is_s3(path):
        uploads.upload(path, file)
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file is in the same folder, because `os.replace` cannot move it to another file system.
    temporary = temporary_path(target)
    try:
        shutil.copyfile(file, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def delete(path: PathOrUri) -> None:
    """Remove a file or object, if it exists.

    Raises:
        OSError: the local file cannot be removed.
        StorageError: the object cannot be removed.
    """
    path = os.fspath(path)
    if is_s3(path):
        objects.remove(path)
    else:
        local_path(path).unlink(missing_ok=True)


def require_writable(folder: PathOrUri) -> None:
    """Write, read and remove a small file in a folder, so that a refusal is known before any work is done.

    Args:
        folder: path or URI; a local folder is created.

    Raises:
        StorageError: the folder or the bucket does not take the file, or does not return it.
        OSError: the disk is full, or the folder is not writable.
    """
    # The name begins with a dot, so that `publish_folder` omits the file. It is unique, so that several
    # machines can try at once.
    file, folder = join(folder, f".writable-{uuid.uuid4().hex}"), os.fspath(folder)
    # A local path may contain bytes that are not UTF-8.
    content = file.encode("utf-8", "surrogateescape")
    try:
        with errors_naming(folder):
            write_bytes(file, content)
            try:
                differs = read_bytes(file) != content
            finally:
                delete(file)
    except StorageError as error:
        # The user knows the folder, but not this file.
        raise type(error)(str(error).replace(file, folder)) from None
    if differs:
        raise StorageError(f"{folder} does not return what is written to it: check the storage.")


def publish_folder(folder: Path, path: str, last: str) -> None:
    """Upload all files below a local folder to a prefix, except those whose names begin with a dot.

    Args:
        folder: the local folder.
        path: the prefix.
        last: name of the file that is uploaded after all others, because it shows that they are complete.

    Raises:
        OSError: a file cannot be read.
        StorageError: object storage cannot be written.
    """
    files = [f.name for f in walk(folder) if f.name != last and not name_of(f.name).startswith(".")]
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        # `list` waits for all uploads, and raises the first failure. `last` is then not uploaded.
        list(pool.map(lambda name: upload(folder / name, join(path, name)), files))
    # Readers look for this file first, so they never use an incomplete folder.
    upload(folder / last, join(path, last))
