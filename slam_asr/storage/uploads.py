"""Objects from disk or memory, in parallel pieces where they are large; visible when all is there.

Every piece carries its SHA-256 for the server to compare, and what the server says that it stored is
compared here: with servers that know no such checksums, the MD5 that is an object's etag. What a
killed program leaves of an upload is invisible; let the bucket's lifecycle rules remove it.
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
from typing import Any, BinaryIO

from slam_asr.errors import UserError
from slam_asr.storage import pieces
from slam_asr.storage.address import split_uri
from slam_asr.storage.client import client
from slam_asr.storage.local import sha256_of_bytes
from slam_asr.storage.objects import SHA256, head
from slam_asr.storage.pieces import Stopped, parallel, unheard
from slam_asr.storage.retry import Absent, Damaged, MayPass, code_of, complete, patiently

_MOST_PARTS = 10_000
"""S3's own limit: larger objects have larger pieces."""
_WRITER = "writer"
"""Name of the metadata that tells which of several conditional writers wrote an object."""


class AlreadyThere(Exception):
    """Another writer was first."""


class _Memory:
    """How many pieces this process holds in memory at once, whatever the number of files."""

    def __init__(self) -> None:
        self.limit()
        # A forked process has none of the threads that held a share.
        os.register_at_fork(after_in_child=self.limit)

    def limit(self) -> None:
        self.share = threading.BoundedSemaphore(pieces.PARALLEL)


_memory = _Memory()


def upload(
    uri: str, file: BinaryIO, sha256: str | None = None, report: Callable[[int], None] | None = None
) -> None:
    """Publish a file as an object, in parallel pieces where it is large; it is visible when all are there.

    Args:
        uri: of the object; one that is there is replaced.
        file: opened for reading; not changed while it is read.
        sha256: of the content; computed if not given.
        report: called with the number of bytes of each piece that was sent, by several threads.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    split_uri(uri)
    file.seek(0)
    sha256 = sha256 or hashlib.file_digest(file, "sha256").hexdigest()
    size = file.seek(0, os.SEEK_END)
    reading = threading.Lock()

    def content(start: int, end: int) -> bytes:
        with reading:
            file.seek(start)
            piece = file.read(end - start)
        if len(piece) != end - start:
            raise UserError(
                f"{getattr(file, 'name', uri)} changed while it was uploaded: run the same command again."
            )
        return piece

    _Upload(uri, sha256, report or unheard).run(size, content)


def write(uri: str, content: bytes | memoryview, only_if_absent: bool = False) -> None:
    """Publish bytes as an object, at once and whole.

    Raises:
        AlreadyThere: it was to be written only if absent, and is there.
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    transfer = _Upload(uri, sha256_of_bytes(content), unheard)
    if only_if_absent:
        transfer.run_first(bytes(content))
    else:
        transfer.run(len(content), lambda start, end: bytes(content[start:end]))


class _Upload:
    """Content on its way to an object."""

    def __init__(self, uri: str, sha256: str, report: Callable[[int], None]) -> None:
        self.uri, self.sha256, self.report = uri, sha256, report
        bucket, key = split_uri(uri)
        if not key:
            raise UserError(f"{uri} is a bucket, and an object's name is needed: give s3://bucket/name.")
        self.place = {"Bucket": bucket, "Key": key}

    def run(self, size: int, content: Callable[[int, int], bytes]) -> None:
        """Replace the object by `size` bytes, of which `content` gives any part."""
        step = max(pieces.PART_BYTES, math.ceil(size / _MOST_PARTS))
        if size <= step:
            whole = content(0, size)
            self._call(
                lambda: self._send("put_object", whole, self.place | {"Metadata": {SHA256: self.sha256}})
            )
            self.report(size)
            return
        begin = self.place | {"Metadata": {SHA256: self.sha256}, "ChecksumAlgorithm": "SHA256"}
        started = self._call(lambda: complete(client().create_multipart_upload(**begin), "UploadId"))
        place = self.place | {"UploadId": started["UploadId"]}
        try:
            starts = range(0, size, step)
            with parallel(len(starts)) as (pool, stop):
                sent = [
                    pool.submit(
                        self._part,
                        place | {"PartNumber": number},
                        functools.partial(content, start, min(start + step, size)),
                        stop,
                    )
                    for number, start in enumerate(starts, start=1)
                ]
                parts = [part.result() for part in sent]
            self._call(lambda: self._complete(place | {"MultipartUpload": {"Parts": parts}}, size))
        except BaseException:
            # Once, and whether it works or not: the failure itself is what matters.
            with contextlib.suppress(Exception):
                client().abort_multipart_upload(**place)
            raise

    def _part(
        self, place: dict[str, Any], content: Callable[[], bytes], stop: threading.Event
    ) -> dict[str, Any]:
        def put() -> dict[str, Any]:
            if stop.is_set():
                raise Stopped
            return self._send("upload_part", piece, place)

        with _memory.share:
            piece = content()
            answer = self._call(put)
            self.report(len(piece))
        return {"PartNumber": place["PartNumber"]} | {
            k: answer[k] for k in ("ETag", "ChecksumSHA256") if k in answer
        }

    def _complete(self, arguments: dict[str, Any], size: int) -> None:
        from botocore.exceptions import ClientError

        try:
            complete(client().complete_multipart_upload(**arguments), "ETag")
        except ClientError as error:
            # An earlier try of ours, whose answer was lost, ends the upload.
            if code_of(error) != "NoSuchUpload" or not self._is_there():
                raise
        known = head(self.uri)
        if known is not None and known.sha256 == self.sha256 and known.bytes != size:
            raise UserError(
                f"{self.uri} has {known.bytes:,} bytes where {size:,} were written: write it anew."
            )

    def _is_there(self) -> bool:
        known = head(self.uri)
        return known is not None and known.sha256 == self.sha256

    def run_first(self, content: bytes) -> None:
        """Write the object if there is none.

        Raises:
            AlreadyThere: there is.
        """
        from botocore.exceptions import ClientError

        writer = uuid.uuid4().hex
        arguments = self.place | {"Metadata": {SHA256: self.sha256, _WRITER: writer}}

        def put() -> None:
            try:
                self._send("put_object", content, arguments | {"IfNoneMatch": "*"})
            except ClientError as error:
                code = code_of(error)
                if code in ("PreconditionFailed", "412"):
                    by = self._writer()
                    if by == writer:
                        return  # an earlier try of ours, whose answer was lost
                    if by is None:
                        raise MayPass("it was removed meanwhile") from None
                    raise AlreadyThere(self.uri) from None
                if code not in ("NotImplemented", "501", "InvalidArgument", "InvalidRequest"):
                    raise
                self._put_unconditionally(content, arguments, writer)

        self._call(put)

    def _put_unconditionally(self, content: bytes, arguments: dict[str, Any], writer: str) -> None:
        """For a server without conditional writes: of writers at the very same time, the last one wins."""
        if self._writer() not in (None, writer):
            raise AlreadyThere(self.uri)
        self._send("put_object", content, arguments)
        if self._writer() != writer:
            raise AlreadyThere(self.uri)

    def _writer(self) -> str | None:
        """Who wrote the object that is there: "" for one that does not say, None where there is none."""
        try:
            found = patiently(
                self.uri, "read", lambda: complete(client().head_object(**self.place), "Metadata", "ETag")
            )
        except Absent:
            return None
        return found["Metadata"].get(_WRITER, "")

    def _send(self, operation: str, content: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
        """Send bytes with their checksum, and compare what the server says that it stored.

        Raises:
            Damaged: it stored something else.
        """
        sum_ = base64.b64encode(hashlib.sha256(content).digest()).decode()
        answer = getattr(client(), operation)(
            Body=content, ChecksumAlgorithm="SHA256", ChecksumSHA256=sum_, **arguments
        )
        etag = complete(answer, "ETag")["ETag"].strip('"')
        if "ChecksumSHA256" in answer:
            if answer["ChecksumSHA256"] != sum_:
                raise Damaged
        elif _is_md5(etag, answer) and hashlib.md5(content, usedforsecurity=False).hexdigest() != etag:
            raise Damaged
        return answer

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return patiently(self.uri, "written", call)
        except Absent:
            raise UserError(
                f"{self.uri} cannot be written: the server knows no such place; check the address."
            ) from None


def _is_md5(etag: str, answer: dict[str, Any]) -> bool:
    # With keys of the key management service, an etag only looks like one.
    return bool(re.fullmatch("[0-9a-f]{32}", etag)) and not str(
        answer.get("ServerSideEncryption", "")
    ).startswith("aws:kms")
