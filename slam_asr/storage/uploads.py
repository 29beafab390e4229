"""Uploads from disk or memory; large objects are sent in parallel pieces. Only complete objects are visible.

The server compares the bytes of each piece with the SHA-256 that is sent along, and this module compares that
SHA-256 with the one in the server's answer. If a server does not support SHA-256, this module compares the
MD5 that the server returns as the etag.

The unfinished upload of a killed program is invisible but takes space: let the bucket's lifecycle rules
remove it.
"""

import base64
import contextlib
import functools
import hashlib
import math
import os
import re
import threading
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from slam_asr.errors import StorageError
from slam_asr.storage import pieces
from slam_asr.storage.address import split_uri
from slam_asr.storage.client import client
from slam_asr.storage.local import sha256_of_bytes
from slam_asr.storage.objects import SHA256, head
from slam_asr.storage.pieces import Cancelled, no_report, parallel
from slam_asr.storage.retry import (
    ChecksumMismatch,
    ObjectMissing,
    TemporaryFailure,
    call_with_retries,
    error_code,
    require_fields,
)

T = TypeVar("T")

_MAX_PARTS = 10_000
"""S3's limit; objects that would need more parts get larger ones."""
_WRITER = "writer"
"""Key of the metadata that identifies which of several conditional writers wrote an object."""
_CHUNK_BYTES = 2**20


class ObjectExists(Exception):
    """A conditional write failed because another writer was first."""


@functools.cache
def _piece_slots(process: int) -> threading.BoundedSemaphore:
    """Return the semaphore that limits how many pieces a process holds in memory at once, over all files.

    Each process has its own: in a forked one, the threads that held a slot do not exist and would never
    release it.

    Args:
        process: id of this process.
    """
    return threading.BoundedSemaphore(pieces.PARALLEL)


def upload(
    uri: str, file: BinaryIO, sha256: str | None = None, report: Callable[[int], None] | None = None
) -> None:
    """Upload a file, in parallel pieces if it is large. The object is visible only when it is complete.

    Args:
        uri: of the object; an existing one is replaced.
        file: opened for reading; must not change meanwhile.
        sha256: of the content; computed if not given.
        report: called by several threads with the number of bytes of each piece that was sent.

    Raises:
        StorageError: the bucket does not exist, access is denied, the server cannot be reached, or the file
            changed.
    """
    split_uri(uri)
    sha256 = sha256 or _sha256_of(file)
    size = file.seek(0, os.SEEK_END)
    reading = threading.Lock()  # the threads share the file's position

    def content(start: int, end: int) -> bytes:
        with reading:
            file.seek(start)
            piece = file.read(end - start)
        if len(piece) != end - start:
            raise StorageError(
                f"{getattr(file, 'name', uri)} changed while it was uploaded: run the same command again."
            )
        return piece

    _Upload(uri, sha256, report or no_report).run(size, content)


def _sha256_of(file: BinaryIO) -> str:
    hashed = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        hashed.update(chunk)
    return hashed.hexdigest()


def write(uri: str, content: bytes | memoryview, only_if_absent: bool = False) -> None:
    """Write bytes to an object, which becomes visible only when it is complete.

    Args:
        uri: of the object.
        content: its bytes.
        only_if_absent: do not replace an existing object.

    Raises:
        ObjectExists: the object exists and `only_if_absent` is true.
        StorageError: the bucket does not exist, access is denied, or the server cannot be reached.
    """
    transfer = _Upload(uri, sha256_of_bytes(content), no_report)
    if only_if_absent:
        transfer.run_if_absent(bytes(content))
    else:
        transfer.run(len(content), lambda start, end: bytes(content[start:end]))


class _Upload:
    """The transfer of one object's content."""

    def __init__(self, uri: str, sha256: str, report: Callable[[int], None]) -> None:
        self.uri, self.sha256, self.report = uri, sha256, report
        bucket, key = split_uri(uri)
        if not key:
            raise StorageError(f"{uri} is a bucket, but an object's name is needed: give s3://bucket/name.")
        self.target = {"Bucket": bucket, "Key": key}

    def run(self, size: int, content: Callable[[int, int], bytes]) -> None:
        """Write the object, replacing an existing one.

        Args:
            size: in bytes.
            content: returns the bytes in [start, end).
        """
        part_bytes = max(pieces.PART_BYTES, math.ceil(size / _MAX_PARTS))
        with_checksum = self.target | {"Metadata": {SHA256: self.sha256}}
        if size <= part_bytes:
            everything = content(0, size)
            self._call(lambda: self._send("put_object", everything, with_checksum))
            self.report(size)
            return
        begin = with_checksum | {"ChecksumAlgorithm": "SHA256"}
        started = self._call(lambda: require_fields(client().create_multipart_upload(**begin), "UploadId"))
        target = self.target | {"UploadId": started["UploadId"]}
        try:
            starts = range(0, size, part_bytes)
            with parallel(len(starts)) as (pool, stop):
                futures = [
                    pool.submit(
                        self._send_part,
                        target | {"PartNumber": number},
                        functools.partial(content, start, min(start + part_bytes, size)),
                        stop,
                    )
                    for number, start in enumerate(starts, start=1)
                ]
                parts = [future.result() for future in futures]
            self._call(lambda: self._complete(target | {"MultipartUpload": {"Parts": parts}}, size))
        except BaseException:
            # A single attempt whose own failure is ignored: the first failure is the one to report.
            with contextlib.suppress(Exception):
                client().abort_multipart_upload(**target)
            raise

    def _send_part(
        self, target: dict[str, Any], content: Callable[[], bytes], stop: threading.Event
    ) -> dict[str, Any]:
        """Send one part.

        Returns:
            The part's number, etag and checksum, by which the request that completes the upload names it.
        """

        def attempt() -> dict[str, Any]:
            if stop.is_set():
                raise Cancelled
            return self._send("upload_part", piece, target)

        # Only now are the bytes read, so that parts that wait for a slot take no memory.
        with _piece_slots(os.getpid()):
            piece = content()
            answer = self._call(attempt)
            self.report(len(piece))
        return {"PartNumber": target["PartNumber"]} | {
            k: answer[k] for k in ("ETag", "ChecksumSHA256") if k in answer
        }

    def _complete(self, arguments: dict[str, Any], size: int) -> None:
        from botocore.exceptions import ClientError

        try:
            require_fields(client().complete_multipart_upload(**arguments), "ETag")
        except ClientError as error:
            # An earlier attempt may have completed the upload, and only its answer was lost.
            if error_code(error) != "NoSuchUpload" or not self._is_complete():
                raise
        # An object with another checksum is not an error: another writer has replaced this one since.
        known = head(self.uri)
        if known is not None and known.sha256 == self.sha256 and known.bytes != size:
            raise StorageError(
                f"{self.uri} has {known.bytes:,} bytes where {size:,} were written: write it again."
            )

    def _is_complete(self) -> bool:
        known = head(self.uri)
        return known is not None and known.sha256 == self.sha256

    def run_if_absent(self, content: bytes) -> None:
        """Write the object if it does not exist.

        Raises:
            ObjectExists: the object exists.
        """
        from botocore.exceptions import ClientError

        writer = uuid.uuid4().hex
        arguments = self.target | {"Metadata": {SHA256: self.sha256, _WRITER: writer}}

        def attempt() -> None:
            try:
                self._send("put_object", content, arguments | {"IfNoneMatch": "*"})
            except ClientError as error:
                code = error_code(error)
                if code in ("PreconditionFailed", "412"):
                    existing = self._writer()
                    if existing == writer:
                        return  # an earlier attempt succeeded, and only its answer was lost
                    if existing is None:
                        raise TemporaryFailure("it was removed meanwhile") from None
                    raise ObjectExists(self.uri) from None
                # Servers without conditional writes answer with one of these codes.
                if code not in ("NotImplemented", "501", "InvalidArgument", "InvalidRequest"):
                    raise
                self._write_unconditionally(content, arguments, writer)

        self._call(attempt)

    def _write_unconditionally(self, content: bytes, arguments: dict[str, Any], writer: str) -> None:
        """Write to a server without conditional writes. If several write at once, the last one wins."""
        if self._writer() not in (None, writer):
            raise ObjectExists(self.uri)
        self._send("put_object", content, arguments)
        if self._writer() != writer:
            raise ObjectExists(self.uri)

    def _writer(self) -> str | None:
        """The writer of the existing object: "" if it names none, None if the object does not exist."""
        try:
            answer = call_with_retries(
                self.uri,
                "read",
                lambda: require_fields(client().head_object(**self.target), "Metadata", "ETag"),
            )
        except ObjectMissing:
            return None
        return answer["Metadata"].get(_WRITER, "")

    def _send(self, operation: str, content: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send bytes with their checksum, and compare the checksum in the server's answer.

        Raises:
            ChecksumMismatch: the server received other bytes.
        """
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        answer: dict[str, Any] = getattr(client(), operation)(
            Body=content, ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum, **arguments
        )
        etag = require_fields(answer, "ETag")["ETag"].strip('"')
        if "ChecksumSHA256" in answer:
            if answer["ChecksumSHA256"] != checksum:
                raise ChecksumMismatch
        elif _is_md5(etag, answer) and hashlib.md5(content, usedforsecurity=False).hexdigest() != etag:
            raise ChecksumMismatch
        return answer

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call_with_retries(self.uri, "written", call)
        except ObjectMissing:
            raise StorageError(
                f"{self.uri} cannot be written: the server does not know this address; check it."
            ) from None


def _is_md5(etag: str, answer: dict[str, Any]) -> bool:
    # With encryption by AWS's key management service, an etag looks like an MD5 but is not one.
    return bool(re.fullmatch("[0-9a-f]{32}", etag)) and not str(
        answer.get("ServerSideEncryption", "")
    ).startswith("aws:kms")
