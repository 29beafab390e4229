"""Fetched objects on local disk, within a bound: the least recently used go first.

Processes share a cache. Each object is fetched by one of them and waited for by the others; one that
any process holds is not removed. All locks are the kernel's, and end with the process that has them.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slam_asr.errors import UserError
from slam_asr.storage.local import local_path

_PARTIAL = ".partial"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_open_locks: set[Any] = set()
"""Files on which threads of this process have locks, or wait for them."""
_opening = threading.Lock()


def _let_go() -> None:
    """A forked process has a share in each lock of its parent's threads, and would keep it for as long as it lives."""
    for lock in _open_locks:
        lock.close()
    _open_locks.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_let_go)


def cache_folder() -> Path:
    """`SLAM_ASR_CACHE`, or `slam-asr` in the user's cache folder."""
    moved = os.environ.get("SLAM_ASR_CACHE")
    if moved:
        return local_path(moved).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slam-asr"


class NoRoom(Exception):
    """An object does not fit: all that is in the cache is in use, or the disk is full."""


class DiskCache:
    """A folder of files that are held while they are used.

    Args:
        folder: shared by the processes of this machine; on a local disk.
        limit: bytes that it may hold, those on their way included.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._locks = folder / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def hold(self, name: str, size: int, fill: Callable[[BinaryIO], None]) -> "Held":
        """A file of this name, filled if it is not there; it stays until released.

        Args:
            name: of the file; says all about its content. It has no slash, and no dot in front.
            size: of it in bytes.
            fill: writes the content to a file opened for reading and writing, or raises. A thread that fills
                one file must not ask for the same one.

        Raises:
            NoRoom: it does not fit.
            OSError: the disk fails.
            UserError: what was filled in has another size.
        """
        while True:
            with self._locked(f"{name}.lock"):
                held = Held(self.folder / name)
                if not held.is_there(size):
                    held.release()
                    self._fill(held.path, size, fill)
                    held = Held(held.path)
            # Between the renaming and the holding, another process may have removed it.
            if held.is_there(size):
                os.utime(held.path)
                return held
            held.release()

    def _fill(self, path: Path, size: int, fill: Callable[[BinaryIO], None]) -> None:
        aside = path.with_name(f".{path.name}{_PARTIAL}")
        try:
            self._reserve(aside, size)
            with open(aside, "r+b") as file:
                fill(file)
                file.flush()
                if (found := os.fstat(file.fileno()).st_size) != size:
                    raise UserError(
                        f"{path.name} has {found:,} bytes and not {size:,}: it is damaged; write it anew."
                    )
                # Its name will vouch for it, even after a crash of the machine.
                os.fsync(file.fileno())
            # Whoever counts meanwhile would miss it under both names.
            with self._locked("room"):
                os.replace(aside, path)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise NoRoom(f"{self.folder}: {error.strerror}") from error
        finally:
            aside.unlink(missing_ok=True)

    def _reserve(self, aside: Path, size: int) -> None:
        """Make room for a file, and take it."""
        with self._locked("room"):
            files = {}
            for file in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if file.is_file() and file != aside:
                        files[file] = file.stat()
            used = sum(s.st_size for s in files.values())
            oldest = iter(sorted(files.items(), key=lambda item: item[1].st_mtime_ns))
            while not (used + size <= self.limit and self._taken(aside, size)):
                for file, status in oldest:
                    if self._removed(file):
                        used -= status.st_size
                        break
                else:
                    if used + size <= self.limit:
                        raise NoRoom(f"{self.folder}: {os.strerror(errno.ENOSPC)}")
                    raise NoRoom(
                        f"{self.folder} holds {used:,} bytes in use, and {size:,} more exceed its limit of {self.limit:,}"
                    )

    def _taken(self, aside: Path, size: int) -> bool:
        """Whether a file got its bytes on disk: blocks of its own, so that a full disk shows now."""
        try:
            with open(aside, "wb") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
            return True
        except OSError as error:
            aside.unlink(missing_ok=True)
            if error.errno not in _DISK_FULL:
                raise
            return False

    def _removed(self, file: Path) -> bool:
        """Remove a file that nobody holds, or what a killed process left half-fetched."""
        if file.name.endswith(_PARTIAL):
            with self._locked(f"{file.name[1 : -len(_PARTIAL)]}.lock", wait=False) as free:
                if free:
                    file.unlink(missing_ok=True)
                return free
        try:
            with open(file, "rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink(missing_ok=True)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        path = self._locks / name
        while True:
            with _opened(path) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    yield False
                    return
                # Whoever had it before removed its file, and a third one may have made another.
                if not _is_same(lock, path):
                    continue
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _opening:
        lock = open(path, "w")  # noqa: SIM115 - closed below, or in a forked process
        _open_locks.add(lock)
    try:
        yield lock
    finally:
        with _opening:
            lock.close()
            _open_locks.discard(lock)


def _is_same(file: Any, path: Path) -> bool:
    """Whether an open file is the one of this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class Held:
    """A file of the cache that stays there until it is released."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO | None = open(path, "rb")  # noqa: SIM115 - closed by release()
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except FileNotFoundError:
            self._file = None

    def is_there(self, size: int) -> bool:
        """Whether the file under this path is the one that is held, and of this size."""
        return (
            self._file is not None
            and os.fstat(self._file.fileno()).st_size == size
            and _is_same(self._file, self.path)
        )

    def release(self) -> None:
        """Let it be removed."""
        if self._file is not None:
            self._file.close()
            self._file = None
