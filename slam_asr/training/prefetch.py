"""Prepares the next items in a thread while the current item is used.

torch's `DataLoader` would copy every batch from a worker process. On two CPU cores, with one worker and the
same depth, `DataLoader` took 3.7 to 3.8 s for 120 batches of cached features, and this thread 0.3 to 0.6 s.
For 48 utterances read from audio files, `DataLoader` took 1.3 to 2.1 s, and this thread 1.3 s.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the given items, which a thread prepares in advance.

    If preparing an item raises an exception, the consumer gets the exception in place of the item.

    Args:
        items: the items. Only the thread iterates over them.
        depth: maximum number of prepared items in the queue. The thread may hold one more, which waits for a
            place in it.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[object, BaseException | None]) -> bool:
        # The timeout lets the thread end if the consumer stops early and leaves the queue full.
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # raised again in the consumer
            put((_END, error))

    threading.Thread(target=produce, name="prefetch", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            # An error is last in the queue, so the consumer has got all items before it.
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        # This also runs if the consumer abandons the generator: closing it raises GeneratorExit at `yield`.
        stopped.set()
