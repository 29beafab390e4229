"""A bounded cache of fetched objects on local disk. The least recently used objects are removed first.

The processes of a machine share a cache. One process fetches an object while others that need it wait, and an
object that a process holds is not removed. All locks are the kernel's (flock), which releases a lock when the
process that holds it ends.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from slam_asr.errors import DISK_FULL, StorageError
from slam_asr.storage.local import PARTIAL, local_path
from slam_asr.storage.locks import exclusive, exclusive_if_free

_CAPACITY_LOCK = "room"
"""Name of the lock for changes to the cache's total size. The locks of objects end in `.lock`."""


def cache_folder() -> Path:
    """Return the folder of all caches: `SLAM_ASR_CACHE`, or `slam-asr` in the user's cache folder."""
    configured = os.environ.get("SLAM_ASR_CACHE")
    if configured:
        return local_path(configured).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slam-asr"


class CacheFull(Exception):
    """An object does not fit: with the files in use, it exceeds the limit; or the disk is full.

    An object that is larger than the limit never fits.
    """


class DiskCache:
    """A folder of cached files. A file is held while it is used.

    Args:
        folder: a folder on a local disk, shared by the processes of this machine.
        limit: maximum total size in bytes, including files that are being fetched.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._locks = folder / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def hold(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        """Hold the file of this name, after fetching it if the cache does not have it.

        Args:
            name: name of the file. It must identify the content, contain no slash and not begin with a dot.
            size: size of the file in bytes.
            fill: a function that writes the content to a file opened for reading and writing. It must not
                hold the same file, which would deadlock.

        Returns:
            The file, opened for reading, which is not removed until it is closed.

        Raises:
            CacheFull: the file does not fit.
            OSError: the disk fails.
            StorageError: `fill` wrote a file of another size.
            Exception: an error of `fill`.
        """
        path = self.folder / name
        while True:
            with self._locked(f"{name}.lock"):
                held = _open_if_valid(path, size)
                if held is None:
                    self._fill(path, size, fill)
                    # The file may have been removed again: a process that makes space removes complete files
                    # without the object's lock, and may do so between the rename in `_fill` and this call.
                    held = _open_if_valid(path, size)
            if held is not None:
                os.utime(path)  # the modification time is the time of the last use
                return held

    def _fill(self, path: Path, size: int, fill: Callable[[BinaryIO], None]) -> None:
        temporary = path.with_name(f".{path.name}{PARTIAL}")
        try:
            self._reserve(temporary, size)
            with open(temporary, "r+b") as file:
                fill(file)
                file.flush()
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    raise StorageError(
                        f"{path.name} has {actual:,} bytes instead of {size:,}: it is damaged; "
                        "write it again."
                    )
                # Flushed to disk, because a renamed file is trusted even after a crash of the machine.
                os.fsync(file.fileno())
            # Without this lock, a process that adds up sizes could miss the file under both of its names.
            with self._locked(_CAPACITY_LOCK):
                os.replace(temporary, path)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise CacheFull(f"{self.folder}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Create a temporary file of this size, removing other files if that is needed to make space."""
        with self._locked(_CAPACITY_LOCK):
            files = {}
            for file in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if file.is_file() and file != temporary:
                        files[file] = file.stat()
            used = sum(s.st_size for s in files.values())
            oldest_first = iter(sorted(files, key=lambda file: files[file].st_mtime_ns))
            # `oldest_first` is an iterator, so every file is tried only once and the loop ends.
            while not (used + size <= self.limit and self._allocate(temporary, size)):
                removed = next((file for file in oldest_first if self._remove_if_unused(file)), None)
                if removed is None:
                    if used + size <= self.limit:
                        raise CacheFull(f"{self.folder}: {os.strerror(errno.ENOSPC)}")
                    raise CacheFull(
                        f"{self.folder} holds {used:,} bytes in use, "
                        f"and {size:,} more exceed its limit of {self.limit:,}"
                    )
                used -= files[removed].st_size

    def _allocate(self, temporary: Path, size: int) -> bool:
        """Create a file and allocate all its disk blocks, so that a full disk is noticed at once.

        Returns:
            Whether the disk has space for it.
        """
        try:
            with open(temporary, "wb") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
            return True
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in DISK_FULL:
                raise
            return False

    def _remove_if_unused(self, file: Path) -> bool:
        """Remove a file that no process holds, or that a killed process left half-fetched.

        Returns:
            Whether the file is gone; false if it is in use.
        """
        if file.name.endswith(PARTIAL):
            # A process that is fetching the object holds the object's lock and may be waiting for the
            # capacity lock, which this process holds. If this process waited for the object's lock, both
            # would wait forever.
            with exclusive_if_free(self._locks / f"{file.name[1 : -len(PARTIAL)]}.lock") as free:
                if free:
                    file.unlink(missing_ok=True)
                return free
        try:
            with contextlib.suppress(FileNotFoundError), open(file, "rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink(missing_ok=True)
            return True
        except BlockingIOError:
            return False

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of this name during the block, and remove its file at the end."""
        path = self._locks / name
        with exclusive(path):
            try:
                yield
            finally:
                # filelock notices that the file on which it waited was removed, and then locks a new one.
                path.unlink(missing_ok=True)


def _open_if_valid(path: Path, size: int) -> BinaryIO | None:
    """Open a cached file, which is not removed until it is closed; None if it is gone or has another size."""
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
        file = stack.enter_context(open(path, "rb"))
        # Any number of processes may hold a file. `_remove_if_unused` needs the exclusive lock.
        fcntl.flock(file, fcntl.LOCK_SH)
        # The file may have been removed or replaced before it was locked.
        status = os.fstat(file.fileno())
        if status.st_size == size and os.path.samestat(status, path.stat()):
            stack.pop_all()  # the caller closes the file
            return file
    return None
