"""Objects to disk in parallel pieces, each tried again by itself, with their checksum compared."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from slam_asr.errors import UserError
from slam_asr.storage import pieces
from slam_asr.storage.address import split_uri
from slam_asr.storage.client import client
from slam_asr.storage.objects import SHA256, Object, head
from slam_asr.storage.pieces import Stopped, parallel, unheard
from slam_asr.storage.retry import Absent, Damaged, MayPass, complete, patiently

_CHUNK_BYTES = 2**20


class _Changed(Exception):
    """The object was replaced between two pieces of one reading."""


def download(
    uri: str,
    file: BinaryIO,
    sha256: str | None = None,
    report: Callable[[int], None] | None = None,
    known: Object | None = None,
) -> None:
    """Fetch an object in parallel pieces, and compare its checksum.

    Args:
        uri: of the object.
        file: on disk, opened for reading and writing; it is overwritten.
        sha256: of the content; that which the object carries if not given.
        report: called with the number of bytes of each piece that arrives, by several threads; with a
            negative one for what must be fetched again.
        known: what is known of the object already, to save a request.

    Raises:
        OSError: the disk is full, or fails.
        UserError: the object is gone, not permitted, not to be reached, or damaged.
    """
    latest = [known]
    transfer = _Download(uri, file, sha256, report or unheard)

    def get() -> None:
        found = latest.pop() if latest else None
        found = found or head(uri)
        if found is None:
            raise Absent
        try:
            transfer.run(found)
        except _Changed:
            raise MayPass("it was replaced while it was read") from None

    try:
        patiently(uri, "read", get)
    except Absent:
        raise UserError(f"There is no object {uri}: check the address.") from None


class _Download:
    """One object on its way into a file."""

    def __init__(self, uri: str, file: BinaryIO, sha256: str | None, report: Callable[[int], None]) -> None:
        self.uri, self.file, self.wanted, self.report = uri, file, sha256, report
        self.bucket, self.key = split_uri(uri)
        self.descriptor = file.fileno()

    def run(self, known: Object) -> None:
        """Fetch what is known to be there.

        Raises:
            Damaged: its checksum differs.
            _Changed: it is another object now.
        """
        with self._by_name():
            self.file.seek(0)
            self.file.truncate(known.bytes)
        starts = range(0, max(known.bytes, 1), pieces.PART_BYTES)
        total, carried = hashlib.sha256(), known.sha256
        with parallel(len(starts)) as (pool, stop):
            ranges = [(start, min(start + pieces.PART_BYTES, known.bytes)) for start in starts]
            arriving = [pool.submit(self._piece, known, start, end, stop) for start, end in ranges]
            for (start, end), piece in zip(ranges, arriving, strict=True):
                carried = piece.result()
                # Out of the system's memory, while the pieces behind it arrive.
                for position in range(start, end, _CHUNK_BYTES):
                    total.update(os.pread(self.descriptor, min(_CHUNK_BYTES, end - position), position))
        wanted = self.wanted or carried
        if wanted and total.hexdigest() != wanted:
            self.report(-known.bytes)
            raise Damaged
        self.file.seek(known.bytes)

    def _piece(self, known: Object, start: int, end: int, stop: threading.Event) -> str | None:
        """Bytes [start, end) into the file; returns the checksum of the whole that the object carries."""
        part = {} if (start, end) == (0, known.bytes) else {"Range": f"bytes={start}-{end - 1}"}

        def get() -> str | None:
            if stop.is_set():
                raise Stopped
            answer = self._open(known, part)
            position = start
            # To the very end, where boto3 compares the server's own checksum if there is one.
            while chunk := answer["Body"].read(_CHUNK_BYTES):
                if position + len(chunk) > end:
                    raise MayPass("the answer was too long")
                self._put(chunk, position)
                position += len(chunk)
            if position != end:
                raise MayPass("the answer was cut short")
            return answer["Metadata"].get(SHA256)

        carried = patiently(self.uri, "read", get)
        self.report(end - start)
        return carried

    def _open(self, known: Object, part: dict[str, str]) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        try:
            answer = client().get_object(Bucket=self.bucket, Key=self.key, IfMatch=f'"{known.etag}"', **part)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
                raise _Changed from None
            raise
        complete(answer, "Body", "Metadata")
        if part and "ContentRange" not in answer:
            raise UserError(
                f"{self.uri} cannot be read in parts: the server at AWS_ENDPOINT_URL knows no ranges."
            )
        return answer

    def _put(self, chunk: bytes, position: int) -> None:
        with self._by_name():
            while chunk:
                written = os.pwrite(self.descriptor, chunk, position)
                chunk, position = chunk[written:], position + written

    @contextlib.contextmanager
    def _by_name(self) -> Iterator[None]:
        """A full disk is told with the file's name."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file.name)) from error
