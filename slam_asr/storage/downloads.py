"""Downloads of objects in parallel pieces. Each piece has its own retries, and the checksum is compared."""

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from typing import BinaryIO

from slam_asr.errors import StorageError
from slam_asr.storage import pieces
from slam_asr.storage.failures import ChecksumMismatch, TemporaryFailure
from slam_asr.storage.local import errors_naming
from slam_asr.storage.objects import SHA256, Info, Replaced, get, require_object
from slam_asr.storage.pieces import in_parallel, no_report
from slam_asr.storage.retry import call_with_retries

_CHUNK_BYTES = 2**20


def download(
    uri: str,
    file: BinaryIO,
    sha256: str | None = None,
    report: Callable[[int], object] = no_report,
    known: Info | None = None,
) -> None:
    """Download an object, and compare its checksum.

    Args:
        uri: the object's URI.
        file: a file on disk, opened for reading and writing; it is overwritten.
        sha256: the expected checksum; if not given, the one in the object's metadata, if it has one.
        report: called with the number of bytes of each piece that arrived, and with a negative number for
            bytes that must be downloaded again.
        known: the object's metadata, if the caller has it, which saves a request.

    Raises:
        OSError: the disk is full, or fails.
        StorageError: the object does not exist or is damaged; access is denied; or the server cannot be
            reached.
    """

    def attempt() -> None:
        nonlocal known
        # A retry must not use the same metadata, because the object may have been replaced since.
        current, known = known or require_object(uri), None
        with errors_naming(file.name):
            file.seek(0)
            file.truncate(current.bytes)
        hashed, arrived = hashlib.sha256(), 0
        fetch = functools.partial(_fetch_piece, uri, current, file)
        try:
            with contextlib.closing(in_parallel(fetch, current.bytes, pieces.PIECE_BYTES)) as fetched:
                for start, end, recorded in fetched:
                    report(end - start)
                    arrived += end - start
                    # `known` may come from a listing, which has no checksum. The answer for a piece has it.
                    expected = sha256 or recorded
                    # Hash the piece from the page cache while later pieces arrive.
                    for position in range(start, end, _CHUNK_BYTES):
                        hashed.update(os.pread(file.fileno(), min(_CHUNK_BYTES, end - position), position))
        except Replaced:
            report(-arrived)  # the next attempt downloads all bytes again
            raise TemporaryFailure("it was replaced while it was read") from None
        if expected and hashed.hexdigest() != expected:
            report(-arrived)
            raise ChecksumMismatch
        file.seek(current.bytes)

    call_with_retries(uri, "read", attempt)


def _fetch_piece(
    uri: str, known: Info, file: BinaryIO, start: int, end: int, cancelled: threading.Event
) -> str | None:
    """Write bytes [start, end) to the file.

    Returns:
        The SHA-256 of the complete object, from its metadata; None if the metadata do not contain it.
    """
    is_complete = (start, end) == (0, known.bytes)

    def attempt() -> str | None:
        answer = get(uri, etag=known.stamp) if is_complete else get(uri, start, end, known.stamp)
        if not is_complete and "ContentRange" not in answer:
            raise StorageError(
                f"{uri} cannot be read in pieces: the server at AWS_ENDPOINT_URL does not support ranges."
            )
        position = start
        # Read until a chunk is empty, because only then boto3 compares the server's own checksum, if any.
        while chunk := answer["Body"].read(_CHUNK_BYTES):
            if position + len(chunk) > end:
                raise TemporaryFailure("the answer was too long")
            while chunk:
                with errors_naming(file.name):
                    written = os.pwrite(file.fileno(), chunk, position)
                chunk, position = chunk[written:], position + written
        if position != end:
            raise TemporaryFailure("the answer was cut short")
        recorded: str | None = answer["Metadata"].get(SHA256)
        return recorded

    return call_with_retries(uri, "read", attempt, cancelled)
