"""Uploads from disk or memory. Large objects are sent in parallel parts. Only complete objects are visible.

Each part is sent with its SHA-256. The server checks the bytes that it received against this SHA-256, and
returns a SHA-256 too; this module compares the two. If a server does not support SHA-256, this module
compares the MD5 that the server returns as the etag. If the answer contains neither, the complete object is
read back.

Some servers refuse requests with a checksum. Such a request is repeated without it, and later requests are
sent without one.

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
from typing import Any, TypeVar

from slam_asr.errors import StorageError
from slam_asr.progress import log_line
from slam_asr.storage import pieces
from slam_asr.storage.address import PathOrUri, split_uri
from slam_asr.storage.client import CHECKSUMS, client, remember_refusal, sends_checksums
from slam_asr.storage.failures import (
    ChecksumMismatch,
    TemporaryFailure,
    error_code,
    require_fields,
    server_words,
)
from slam_asr.storage.local import sha256_of_bytes, sha256_of_file
from slam_asr.storage.objects import SHA256, WRITER, head, open_object
from slam_asr.storage.pieces import in_parallel
from slam_asr.storage.retry import call_with_retries

T = TypeVar("T")

_MAX_PARTS = 10_000
"""S3's limit. An object that would need more parts gets larger ones."""
_REFUSES_CHECKSUMS = ("InvalidArgument", "InvalidRequest", "NotImplemented", "501", "400")
"""Codes with which servers refuse a header that they do not know, such as that of a checksum."""


def upload(uri: str, file: PathOrUri) -> None:
    """Upload a local file. The object is visible only when it is complete.

    Args:
        uri: the object's URI; an existing object is replaced.
        file: the local file, which must not change during the upload.

    Raises:
        OSError: the file cannot be read.
        StorageError: the bucket does not exist, access is denied, the server cannot be reached, the file
            changed, or the server saved other bytes.
    """
    # The file is read twice, because the first request of an upload contains the metadata with the SHA-256.
    transfer = _Upload(uri, sha256_of_file(file))
    with open(file, "rb") as stream:

        def content(start: int, end: int) -> bytes:
            # Threads share this file. Unlike seek and read, `pread` does not change its position.
            part = os.pread(stream.fileno(), end - start, start)
            if len(part) != end - start:
                raise StorageError(f"{file} changed while it was uploaded: run the same command again.")
            return part

        transfer.run(os.fstat(stream.fileno()).st_size, content)


def write(uri: str, content: bytes | memoryview, only_if_absent: bool = False) -> bool:
    """Write bytes to an object, which becomes visible only when it is complete.

    Args:
        uri: the object's URI.
        content: its bytes.
        only_if_absent: whether to refuse to replace an existing object.

    Returns:
        Whether the object was written: false if it exists and `only_if_absent` is true.

    Raises:
        StorageError: the bucket does not exist, access is denied, the server cannot be reached, or it saved
            other bytes.
    """
    transfer = _Upload(uri, sha256_of_bytes(content))
    if only_if_absent:
        return transfer.run_if_absent(bytes(content))
    transfer.run(len(content), lambda start, end: bytes(content[start:end]))
    return True


class _Upload:
    """The transfer of one object's content."""

    def __init__(self, uri: str, sha256: str) -> None:
        self.uri, self.sha256 = uri, sha256
        bucket, key = split_uri(uri)
        if not key:
            raise StorageError(f"{uri} is a bucket, but an object's name is needed: give s3://bucket/name.")
        self.target = {"Bucket": bucket, "Key": key}
        self.compared = True
        """Whether each answer of the server so far has shown that it received the right bytes."""

    def run(self, size: int, content: Callable[[int, int], bytes]) -> None:
        """Write the object, replacing an existing one.

        Args:
            size: size of the object in bytes.
            content: a function that returns the bytes in [start, end).
        """
        part_bytes = max(pieces.PIECE_BYTES, math.ceil(size / _MAX_PARTS))
        with_checksum = self.target | {"Metadata": {SHA256: self.sha256}}
        if size <= part_bytes:
            everything = content(0, size)
            self._call(lambda: self._send("put_object", everything, with_checksum))
            self._read_back()
            return
        algorithm = {"ChecksumAlgorithm": "SHA256"}
        started = self._call(
            lambda: require_fields(_request("create_multipart_upload", with_checksum, algorithm), "UploadId")
        )
        target = self.target | {"UploadId": started["UploadId"]}

        def send_part(start: int, end: int, cancelled: threading.Event) -> dict[str, Any]:
            part: dict[str, Any] = {"PartNumber": start // part_bytes + 1}
            # The bytes are read only after a slot is free, so that waiting parts take no memory.
            with _part_slots(os.getpid()):
                part_content = content(start, end)
                answer = self._call(lambda: self._send("upload_part", part_content, target | part), cancelled)
            # The request that completes the upload names each part by its number, etag and checksum.
            return part | {k: answer[k] for k in ("ETag", "ChecksumSHA256") if k in answer}

        try:
            with contextlib.closing(in_parallel(send_part, size, part_bytes)) as sent:
                parts = [part for _, _, part in sent]
            self._call(lambda: self._complete(target | {"MultipartUpload": {"Parts": parts}}, size))
        except BaseException:
            # A single attempt. If it fails too, only the first failure is reported.
            with contextlib.suppress(Exception):
                client().abort_multipart_upload(**target)
            raise
        self._read_back()

    def _complete(self, arguments: dict[str, Any], size: int) -> None:
        from botocore.exceptions import ClientError

        try:
            require_fields(client().complete_multipart_upload(**arguments), "ETag")
        except ClientError as error:
            # An earlier attempt may have completed the upload although its answer was lost.
            existing = head(self.uri) if error_code(error) == "NoSuchUpload" else None
            if existing is None or existing.sha256 != self.sha256:
                raise
        # An object with another checksum is not an error, because another writer has replaced this one since.
        known = head(self.uri)
        if known is not None and known.sha256 == self.sha256 and known.bytes != size:
            raise StorageError(
                f"{self.uri} has {known.bytes:,} bytes where {size:,} were written: write it again."
            )

    def run_if_absent(self, content: bytes) -> bool:
        """Write the object if it does not exist; return whether it was written."""
        from botocore.exceptions import ClientError

        writer = uuid.uuid4().hex
        arguments = self.target | {"Metadata": {SHA256: self.sha256, WRITER: writer}}

        def attempt() -> bool:
            try:
                self._send("put_object", content, arguments | {"IfNoneMatch": "*"})
                return True
            except ClientError as error:
                code = error_code(error)
                # Servers without conditional writes answer with one of these codes.
                has_conditions = code not in ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")
                if has_conditions and code not in ("PreconditionFailed", "412"):
                    raise
            existing = head(self.uri)
            if existing is None:
                if has_conditions:
                    raise TemporaryFailure("it was removed meanwhile")
                # Without conditions, the last of several simultaneous writers wins.
                self._send("put_object", content, arguments)
                existing = head(self.uri)
            # This writer's name is also there if the answer to an earlier attempt was lost.
            return existing is not None and existing.writer == writer

        written = self._call(attempt)
        if written:
            self._read_back()
        return written

    def _send(self, operation: str, content: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send bytes with their checksum, and compare the checksum in the server's answer.

        Raises:
            ChecksumMismatch: the server received other bytes.
        """
        checksum = base64.b64encode(hashlib.sha256(content).digest()).decode()
        checksums = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": checksum}
        answer = _request(operation, arguments | {"Body": content}, checksums)
        etag = require_fields(answer, "ETag")["ETag"].strip('"')
        if "ChecksumSHA256" in answer:
            if answer["ChecksumSHA256"] != checksum:
                raise ChecksumMismatch
        elif not _is_md5(etag, answer):
            self.compared = False
        # Where a policy forbids MD5 (FIPS), Python permits it only with `usedforsecurity=False`.
        elif hashlib.md5(content, usedforsecurity=False).hexdigest() != etag:
            raise ChecksumMismatch
        return answer

    def _read_back(self) -> None:
        """Read the object back and compare it, if the server's answers did not show that it is right.

        Raises:
            StorageError: the object differs.
        """
        known = None if self.compared else head(self.uri)
        # An object with another checksum is not an error, because another writer has replaced this one since.
        if known is None or known.sha256 not in (None, self.sha256):
            return
        with open_object(self.uri) as stream:
            received = hashlib.file_digest(stream, "sha256").hexdigest()
        if received != self.sha256:
            raise StorageError(f"{self.uri} is damaged (its checksum differs): write it again.")

    def _call(self, call: Callable[[], T], cancelled: threading.Event | None = None) -> T:
        return call_with_retries(self.uri, "written", call, cancelled)


@functools.cache
def _part_slots(process: int) -> threading.BoundedSemaphore:
    """Return the semaphore that limits the number of parts in a process's memory, over all files.

    Each process has its own semaphore. In a forked process, the parent's threads do not exist, so they would
    never release the slots that they held.

    Args:
        process: id of this process.
    """
    return threading.BoundedSemaphore(pieces.PARALLEL_PIECES)


def _request(operation: str, arguments: dict[str, Any], checksum: dict[str, str]) -> dict[str, Any]:
    """Make a request with a checksum, or without one if the user or the server refuses checksums.

    Args:
        operation: name of boto3's method.
        arguments: the method's arguments, except those in `checksum`.
        checksum: the arguments that request or contain a checksum.
    """
    from botocore.exceptions import ClientError

    connection = client()
    if not sends_checksums(connection):
        checksum = {}
    try:
        answer: dict[str, Any] = getattr(connection, operation)(**arguments, **checksum)
    except ClientError as error:
        code = error_code(error)
        if not checksum or code not in _REFUSES_CHECKSUMS:
            raise
        # If the server refused the request for another reason, this raises the server's error again.
        answer = getattr(client(checksums=False), operation)(**arguments)
        remember_refusal()
        log_line(
            f"the object storage refuses checksums: {code}{server_words(error)}; writing without them, and "
            f"comparing what it stores. To send none from the start, set {CHECKSUMS}=when_required."
        )
    return answer


def _is_md5(etag: str, answer: dict[str, Any]) -> bool:
    # With encryption by AWS's key management service, an etag looks like an MD5 but is not one.
    is_encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return not is_encrypted and bool(re.fullmatch("[0-9a-f]{32}", etag))
