"""Parallel transfers: large objects are sent and fetched in several pieces at once."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

PART_BYTES = 16 * 2**20
"""Size of a piece of a parallel transfer."""
PARALLEL = 8


class Cancelled(Exception):
    """Another piece of the same transfer failed, so this one is not needed."""


@contextlib.contextmanager
def parallel(pieces: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Provide threads for this many pieces, and an event that is set when the block fails.

    Threads that see the event raise `Cancelled` instead of retrying for a transfer that has already failed.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(min(PARALLEL, pieces))
    try:
        yield pool, stop
    except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()


def no_report(_: int) -> None:
    """Ignore progress, for callers that do not display it."""
