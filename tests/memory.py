"""Measures a program's memory, without mapped files: the kernel can drop those if memory is short."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_of_anonymous_memory() -> Iterator[list[int]]:
    """Measure the largest growth of this process's anonymous memory.

    Yields:
        A list. At the end, it gets one number: the peak minus the amount at the beginning, in bytes.
    """
    seen, done = [_anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(_anonymous_bytes())

    watcher, result = threading.Thread(target=watch), []
    watcher.start()
    try:
        yield result
    finally:
        done.set()
        watcher.join()
        result.append(max(seen) - seen[0])


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
