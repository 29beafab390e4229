"""Single requests: list objects, read their bytes or metadata, stream them, remove them.

Objects that this project writes carry the SHA-256 of their bytes. It is compared whenever an object is read
completely.
"""

import base64
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slam_asr.errors import StorageError
from slam_asr.storage.address import folder_prefix, split_uri
from slam_asr.storage.client import client
from slam_asr.storage.failures import (
    ChecksumMismatch,
    Damaged,
    ObjectMissing,
    TemporaryFailure,
    http_status,
    require_fields,
)
from slam_asr.storage.local import sha256_of_bytes
from slam_asr.storage.retry import call_with_retries

if TYPE_CHECKING:
    from typing_extensions import Buffer

SHA256, WRITER = "sha256", "writer"
"""Keys of an object's metadata: its checksum, and the conditional writer that wrote it; see `Info.writer`."""
_STREAM_BYTES = 8 * 2**20
"""Bytes per request of a stream. An object of at most this size is read, and its checksum compared, before a
stream returns any byte."""


class Replaced(StorageError):
    """The object was replaced between two requests for parts of it."""


@dataclass(frozen=True)
class Info:
    """The size and version of a file or object."""

    name: str
    """Path below the folder that was walked, with slashes; for a single file, the last part of its path."""
    bytes: int
    stamp: str
    """Changes with the content: the modification time in ns, or the object's etag."""
    sha256: str | None = None
    """The digest of an object's content; None in listings, and for objects from other programs."""
    writer: str | None = None
    """Random name of the writer, if the object was written on the condition that it did not exist."""


def list_objects(uri: str) -> Iterator[Info]:
    """Yield all objects below a prefix, sorted by key.

    Raises:
        StorageError: the bucket does not exist, access is denied, or the server cannot be reached.
    """
    for item in _list(uri, "Contents"):
        name = item["Key"].removeprefix(folder_prefix(split_uri(uri)[1])).lstrip("/")
        # Web consoles create empty objects with a slash at the end, to show an empty folder.
        if name and not name.endswith("/"):
            yield Info(name, item["Size"], item["ETag"].strip('"'))


def list_names(uri: str, folders: bool) -> list[str]:
    """Return the names of the objects directly below a prefix, or of the folders there, sorted.

    Raises:
        StorageError: the bucket does not exist, access is denied, or the server cannot be reached.
    """
    prefix = folder_prefix(split_uri(uri)[1])
    group, key = ("CommonPrefixes", "Prefix") if folders else ("Contents", "Key")
    names = [item[key].removeprefix(prefix).rstrip("/") for item in _list(uri, group, Delimiter="/")]
    return sorted(filter(None, names))


def _list(uri: str, group: str, **arguments: str) -> Iterator[dict[str, Any]]:
    """Yield the items of one group, `Contents` or `CommonPrefixes`, in the server's listing of a prefix."""
    bucket, prefix = split_uri(uri)
    arguments |= {"Bucket": bucket, "Prefix": folder_prefix(prefix)}
    while True:
        # Some servers send IsTruncated after the names. An answer without it may have been cut short.
        page = call_with_retries(
            uri, "listed", lambda: require_fields(client().list_objects_v2(**arguments), "IsTruncated")
        )
        yield from page.get(group, [])
        if not page["IsTruncated"]:
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def head(uri: str) -> Info | None:
    """Return the size and metadata of an object, or None if it does not exist.

    Raises:
        StorageError: access is denied, or the server cannot be reached.
    """
    bucket, key = split_uri(uri)
    if not key:
        return None

    def attempt() -> Info:
        answer = client().head_object(Bucket=bucket, Key=key)
        metadata = require_fields(answer, "ContentLength", "ETag", "Metadata")["Metadata"]
        return Info(
            name=key.rstrip("/").rpartition("/")[2],
            bytes=answer["ContentLength"],
            stamp=answer["ETag"].strip('"'),
            sha256=metadata.get(SHA256),
            writer=metadata.get(WRITER),
        )

    try:
        return call_with_retries(uri, "read", attempt)
    except ObjectMissing:
        return None


def require_object(uri: str) -> Info:
    """Return the size and metadata of an object.

    Raises:
        StorageError: the object does not exist, access is denied, or the server cannot be reached.
    """
    known = head(uri)
    if known is None:
        raise StorageError(f"There is no object {uri}: check the address.")
    return known


def get(uri: str, start: int = 0, end: int | None = None, etag: str | None = None) -> dict[str, Any]:
    """Make one attempt to open an object, or its bytes in [start, end).

    Args:
        uri: the object's URI.
        start: offset of the first byte.
        end: offset after the last byte; the object's end if not given.
        etag: ETag of the only version that may be read; any version if not given.

    Returns:
        boto3's answer: a stream of the bytes as `Body`, and fields that describe them.

    Raises:
        Replaced: the object has another etag.
        TemporaryFailure: the answer is truncated.
        Exception: errors of boto3.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_uri(uri)
    arguments = {"Bucket": bucket, "Key": key}
    if start or end is not None:
        # HTTP's ranges include their last byte.
        arguments["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    if etag is not None:
        arguments["IfMatch"] = f'"{etag}"'
    try:
        return require_fields(client().get_object(**arguments), "Body", "ContentLength", "Metadata")
    except ClientError as error:
        if http_status(error) == 412:  # IfMatch did not match
            raise Replaced(f"{uri} was replaced while it was read: run the same command again.") from None
        raise


def read(uri: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
    """Read an object's bytes, or those in [start, end).

    Args:
        uri: the object's URI.
        start: offset of the first byte.
        end: offset after the last byte; the object's end if not given.
        etag: ETag of the only version that may be read; any version if not given.

    Raises:
        Replaced: the object has another etag.
        StorageError: the object does not exist, is damaged or ends before `end`; access is denied, or the
            server cannot be reached.
    """
    if not split_uri(uri)[1]:
        raise StorageError(f"{uri} is a bucket, not an object: check the address.")
    if end is not None and end <= start:
        return b""

    def attempt() -> bytes:
        answer = get(uri, start, end, etag)
        content: bytes = answer["Body"].read()
        if len(content) != answer["ContentLength"]:
            raise TemporaryFailure("the answer was cut short")
        if start == 0 and end is None:
            expected = answer["Metadata"].get(SHA256)
            must_compare = expected and not _compared_by_boto3(answer, expected)
            if must_compare and sha256_of_bytes(content) != expected:
                raise ChecksumMismatch
        else:
            # A server without support for ranges sends the complete object.
            content = content if "ContentRange" in answer else content[start:end]
            if end is not None and len(content) < end - start:
                raise Damaged(f"{uri} is damaged (it ends before byte {end}): write it again.")
        return content

    return call_with_retries(uri, "read", attempt)


def _compared_by_boto3(answer: dict[str, Any], expected: str) -> bool:
    """Return whether boto3 has already compared the bytes with this checksum."""
    from botocore.httpchecksum import StreamingChecksumBody

    # boto3 compares only one of an answer's checksums. It is surely this one only if there is no other.
    sums = [name for name in answer if name.startswith("Checksum") and name != "ChecksumType"]
    return (
        isinstance(answer["Body"], StreamingChecksumBody)
        and sums == ["ChecksumSHA256"]
        and base64.b64decode(answer["ChecksumSHA256"]).hex() == expected
    )


def remove(uri: str) -> None:
    """Delete an object, if it exists.

    Raises:
        StorageError: the bucket does not exist, access is denied, or the server cannot be reached.
    """
    bucket, key = split_uri(uri)
    call_with_retries(uri, "removed", lambda: client().delete_object(Bucket=bucket, Key=key))


def open_object(uri: str) -> io.BufferedReader:
    """Open an object for reading from start to end; see `ObjectStream`."""
    # Without a buffer, a reader in small steps would make a request for each of them.
    return io.BufferedReader(ObjectStream(uri), _STREAM_BYTES)


class ObjectStream(io.RawIOBase):
    """Reads an object from start to end in ranges. Each range has its own retries.

    If the checksum of all bytes differs, the last read raises an error. The bytes that earlier reads returned
    must then not be used.

    Args:
        uri: the object's URI.

    Raises:
        StorageError: the object does not exist, is damaged or is replaced while it is read; or the server
            cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.position, self._known = uri, 0, require_object(uri)
        self.size = self._known.bytes
        self._hash = hashlib.sha256()
        self._content: bytes | None = None
        """All bytes of an object of at most `_STREAM_BYTES`; None until the first read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        with memoryview(buffer).cast("B") as view:
            content = self._next(len(view))
            view[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        # The base class would make a request for every few KB.
        return b"".join(iter(lambda: self._next(_STREAM_BYTES), b""))

    def _next(self, size: int) -> bytes:
        if self.size <= _STREAM_BYTES and self._content is None:
            # `read` compares the checksum, and retries the request if it differs. The request has no etag, so
            # the object may have been replaced by one of another size since `head`.
            self._content = read(self.uri)
            self.size = len(self._content)
        end = min(self.position + size, self.size)
        if self._content is not None:
            content = self._content[self.position : end]
        else:
            content = read(self.uri, self.position, end, self._known.stamp)
            self._hash.update(content)
            if content and end == self.size and self._known.sha256 not in (None, self._hash.hexdigest()):
                raise Damaged(
                    f"{self.uri} is damaged (its checksum differs): "
                    "read it again, and if that fails too, write it again."
                )
        self.position = end
        return content
