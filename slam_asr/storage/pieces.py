"""Large objects travel in pieces, several at once."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

PART_BYTES = 16 * 2**20
"""Size of a piece of a parallel transfer."""
PARALLEL = 8


class Stopped(Exception):
    """Another piece has failed, and this one is not needed any more."""


@contextlib.contextmanager
def parallel(pieces: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads for so many pieces, and a sign to them to give up that is set when any fails."""
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


def unheard(_: int) -> None:
    """Where nobody wants to be told of progress."""
