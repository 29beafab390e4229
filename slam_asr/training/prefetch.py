"""Prepares the next items in a thread while the current item is used.

torch's `DataLoader` would copy every batch from a worker process. On two CPU cores, with one worker and the
same depth, `DataLoader` took 3.7 to 3.8 s for 120 batches of cached features, and this thread 0.3 to 0.6 s.
For 48 utterances read from audio files, `DataLoader` took 1.3 to 2.1 s, and this thread 1.3 s.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the given items, which a thread prepares in advance.

    If preparing an item raises an exception, the consumer gets the exception in place of the item.

    Args:
        items: the items. Only the thread iterates over them.
        depth: number of items that are prepared in advance while one more is being prepared; at most
            `depth + 1` prepared items wait. When Python exits, it waits for the item in preparation; training
            processes leave with `os._exit`.
    """
    iterator = iter(items)
    # The items are prepared in order, because there is only one thread.
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ready = deque(pool.submit(next, iterator, _END) for _ in range(depth + 1))
        while (item := ready.popleft().result()) is not _END:
            ready.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        # This also runs if the consumer abandons the generator: closing it raises GeneratorExit at `yield`.
        pool.shutdown(wait=False, cancel_futures=True)
