"""Parallel transfers: large objects are sent and fetched in several pieces at once.

boto3's own s3transfer is not used. One TransferManager for all files, with a comparison of each file's
checksum afterwards, took 1.1 to 1.2 times as long for an object of 200 MB and 1.0 to 1.4 times as long for
500 objects of 16 KB, with up to 1.5 times the processor time; `benchmarks/storage.py` compares downloads. The
retries of s3transfer are limited by number instead of time, are not logged, and do not include pieces that
arrive damaged.
"""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from slam_asr.storage.retry import Cancelled

T = TypeVar("T")

PIECE_BYTES = 16 * 2**20
PARALLEL_PIECES = 8
"""Number of pieces of an object that are transferred at once."""


def no_report(_: int) -> None:
    """Ignore progress, for callers that do not display it."""


def in_parallel(
    transfer: Callable[[int, int, threading.Event], T], size: int, piece_bytes: int
) -> Generator[tuple[int, int, T], None, None]:
    """Transfer `size` bytes in pieces, several at once in threads.

    Args:
        transfer: a function of the piece's offset, the offset of its end, and an event that is set when
            another piece has failed.
        size: size of all pieces together in bytes. A size of 0 gives one empty piece.
        piece_bytes: size in bytes of every piece except the last.

    Yields:
        The offset of each piece, the offset of its end, and the result of its transfer, in order.

    Raises:
        Exception: the error of the piece that failed first. The other pieces are then cancelled.
    """
    cancelled = threading.Event()
    failures: list[BaseException] = []

    def run(start: int) -> tuple[int, int, T]:
        end = min(start + piece_bytes, size)
        try:
            return start, end, transfer(start, end, cancelled)
        except BaseException as error:
            failures.append(error)
            cancelled.set()
            raise

    starts = range(0, max(size, 1), piece_bytes)
    with ThreadPoolExecutor(min(PARALLEL_PIECES, len(starts))) as pool:
        try:
            yield from pool.map(run, starts)
        except Cancelled:
            # A later piece failed first, and its error is the one to report.
            raise failures[0] from None
        finally:
            cancelled.set()
