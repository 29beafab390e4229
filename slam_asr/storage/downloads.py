"""Downloads of objects in parallel pieces. Each piece is retried by itself, and the checksum is compared."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from slam_asr.errors import StorageError
from slam_asr.storage import pieces
from slam_asr.storage.address import split_uri
from slam_asr.storage.client import client
from slam_asr.storage.objects import SHA256, Object, head
from slam_asr.storage.pieces import Cancelled, no_report, parallel
from slam_asr.storage.retry import (
    ChecksumMismatch,
    ObjectMissing,
    TemporaryFailure,
    call_with_retries,
    http_status,
    require_fields,
)

_CHUNK_BYTES = 2**20


class _Replaced(Exception):
    """The object was replaced between two pieces of a download."""


def download(
    uri: str,
    file: BinaryIO,
    sha256: str | None = None,
    report: Callable[[int], None] | None = None,
    known: Object | None = None,
) -> None:
    """Download an object in parallel pieces, and compare its checksum.

    Args:
        uri: of the object.
        file: on disk, opened for reading and writing; it is overwritten.
        sha256: the expected checksum; if not given, the one that the object carries.
        report: called by several threads with the number of bytes of each piece that arrived, and with a
            negative number for bytes that must be downloaded again.
        known: the object's metadata, if the caller has it; saves a request.

    Raises:
        OSError: the disk is full, or fails.
        StorageError: the object does not exist or is damaged; access is denied; or the server cannot be
            reached.
    """
    first_known = [known]
    transfer = _Download(uri, file, sha256, report or no_report)

    def attempt() -> None:
        # A retry must not use the same metadata: the object may have been replaced since.
        current = first_known.pop() if first_known else None
        current = current or head(uri)
        if current is None:
            raise ObjectMissing
        try:
            transfer.run(current)
        except _Replaced:
            raise TemporaryFailure("it was replaced while it was read") from None

    try:
        call_with_retries(uri, "read", attempt)
    except ObjectMissing:
        raise StorageError(f"There is no object {uri}: check the address.") from None


class _Download:
    """The transfer of one object into a file."""

    def __init__(self, uri: str, file: BinaryIO, sha256: str | None, report: Callable[[int], None]) -> None:
        self.uri, self.file, self.expected, self.report = uri, file, sha256, report
        self.bucket, self.key = split_uri(uri)
        self.descriptor = file.fileno()

    def run(self, known: Object) -> None:
        """Download the object that is known to exist.

        Raises:
            ChecksumMismatch: the bytes differ from the object's checksum.
            _Replaced: the object's etag is no longer that of `known`.
        """
        with self._naming_the_file():
            self.file.seek(0)
            self.file.truncate(known.bytes)
        # An empty object has one piece too, because a thread pool needs at least one thread.
        starts = range(0, max(known.bytes, 1), pieces.PART_BYTES)
        hashed, carried = hashlib.sha256(), known.sha256
        with parallel(len(starts)) as (pool, stop):
            ranges = [(start, min(start + pieces.PART_BYTES, known.bytes)) for start in starts]
            futures = [pool.submit(self._fetch_piece, known, start, end, stop) for start, end in ranges]
            for (start, end), piece in zip(ranges, futures, strict=True):
                # `known` may come from a listing, which has no checksum; the answer to each piece has it.
                carried = piece.result()
                # Hash the piece from the page cache while later pieces arrive.
                for position in range(start, end, _CHUNK_BYTES):
                    hashed.update(os.pread(self.descriptor, min(_CHUNK_BYTES, end - position), position))
        expected = self.expected or carried
        if expected and hashed.hexdigest() != expected:
            self.report(-known.bytes)  # the caller downloads all bytes again
            raise ChecksumMismatch
        self.file.seek(known.bytes)

    def _fetch_piece(self, known: Object, start: int, end: int, stop: threading.Event) -> str | None:
        """Write bytes [start, end) to the file.

        Returns:
            The SHA-256 of the complete object, from its metadata; None if the metadata has none.
        """
        byte_range = {} if (start, end) == (0, known.bytes) else {"Range": f"bytes={start}-{end - 1}"}

        def attempt() -> str | None:
            if stop.is_set():
                raise Cancelled
            answer = self._open(known, byte_range)
            position = start
            # Read until the empty chunk: only then does boto3 compare the server's own checksum, if any.
            while chunk := answer["Body"].read(_CHUNK_BYTES):
                if position + len(chunk) > end:
                    raise TemporaryFailure("the answer was too long")
                self._write(chunk, position)
                position += len(chunk)
            if position != end:
                raise TemporaryFailure("the answer was cut short")
            return answer["Metadata"].get(SHA256)

        carried = call_with_retries(self.uri, "read", attempt)
        self.report(end - start)
        return carried

    def _open(self, known: Object, byte_range: dict[str, str]) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        try:
            answer = client().get_object(
                Bucket=self.bucket, Key=self.key, IfMatch=f'"{known.etag}"', **byte_range
            )
        except ClientError as error:
            if http_status(error) == 412:  # IfMatch did not match
                raise _Replaced from None
            raise
        require_fields(answer, "Body", "Metadata")
        if byte_range and "ContentRange" not in answer:
            raise StorageError(
                f"{self.uri} cannot be read in parts: the server at AWS_ENDPOINT_URL does not support ranges."
            )
        return dict(answer)

    def _write(self, chunk: bytes, position: int) -> None:
        with self._naming_the_file():
            while chunk:
                written = os.pwrite(self.descriptor, chunk, position)
                chunk, position = chunk[written:], position + written

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Add the file's name to an error of the disk, so that the message contains it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file.name)) from error
