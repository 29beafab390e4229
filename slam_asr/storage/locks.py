"""Locks between processes (filelock). The kernel releases a lock when its process ends, however it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from slam_asr.progress import log_line


@contextlib.contextmanager
def exclusive(file: Path, while_waiting: str = "") -> Iterator[None]:
    """Hold a lock during the block, after waiting for any other process or thread that holds it.

    Args:
        file: the lock's file, which is created; its folder must exist.
        while_waiting: line for the log if another process or thread holds the lock.
    """
    # Each call creates its own lock object, so that threads wait for each other too.
    lock = FileLock(file)
    try:
        # Only a first attempt without waiting shows whether there is something to log.
        held = lock.acquire(blocking=False)
    except Timeout:
        if while_waiting:
            log_line(while_waiting)
        held = lock.acquire()
    with held:
        yield


@contextlib.contextmanager
def exclusive_if_free(file: Path) -> Iterator[bool]:
    """Hold a lock during the block if no other process or thread holds it; yield whether this call holds it.

    Args:
        file: the lock's file, which is created; its folder must exist.
    """
    try:
        held = FileLock(file).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with held:
        yield True
