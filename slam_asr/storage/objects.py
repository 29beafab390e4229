"""Single requests about objects: what there is, its bytes, and a stream of them.

Objects written here carry the SHA-256 of their bytes, which is compared whenever they are read whole.
"""

import base64
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slam_asr.errors import UserError
from slam_asr.storage.address import folder_of, split_uri
from slam_asr.storage.client import client
from slam_asr.storage.local import sha256_of_bytes
from slam_asr.storage.retry import Absent, Damaged, MayPass, complete, patiently

SHA256 = "sha256"
"""Name of the metadata that holds the checksum of an object written here."""
_STREAM_BYTES = 8 * 2**20
"""A stream asks for this much at once; what is not larger is compared with its checksum before it is handed on."""


@dataclass(frozen=True)
class Object:
    """An object in a bucket."""

    key: str
    bytes: int
    etag: str
    """Changes with the content."""
    sha256: str | None = None
    """Of the content, where the object was written here and was asked for by itself."""


class Replaced(Exception):
    """An object is not any more the one that was asked for."""


def list_objects(uri: str) -> Iterator[Object]:
    """The object of this address, or all below it as below a folder, by key; none where there is nothing.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    prefix = split_uri(uri)[1]
    folder = folder_of(prefix)
    for page in _pages(uri, Prefix=prefix):
        for found in page.get("Contents", []):
            if found["Key"] == prefix or found["Key"].startswith(folder):
                yield Object(found["Key"], found["Size"], found["ETag"].strip('"'))


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below a prefix, in order.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    folder = folder_of(split_uri(uri)[1])
    pages = _pages(uri, Prefix=folder, Delimiter="/")
    return [
        p["Prefix"].removeprefix(folder).rstrip("/") for page in pages for p in page.get("CommonPrefixes", [])
    ]


def list_files(uri: str) -> Iterator[Object]:
    """The objects right below a prefix, in order, without those deeper down.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    folder = folder_of(split_uri(uri)[1])
    for page in _pages(uri, Prefix=folder, Delimiter="/"):
        for found in page.get("Contents", []):
            if found["Key"] != folder:
                yield Object(found["Key"], found["Size"], found["ETag"].strip('"'))


def _pages(uri: str, **arguments: str) -> Iterator[dict[str, Any]]:
    arguments["Bucket"] = split_uri(uri)[0]
    while True:
        # IsTruncated stands behind the names in some servers' answers: without it, the page may not be all.
        page = _found(uri, "listed", lambda: complete(client().list_objects_v2(**arguments), "IsTruncated"))
        yield page
        if not page["IsTruncated"]:
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def head(uri: str) -> Object | None:
    """What is known of one object, or None where there is none.

    Raises:
        UserError: the bucket is not permitted, or not to be reached.
    """
    bucket, key = split_uri(uri)
    if not key:
        return None
    try:
        found = patiently(
            uri,
            "read",
            lambda: complete(
                client().head_object(Bucket=bucket, Key=key), "ContentLength", "ETag", "Metadata"
            ),
        )
    except Absent:
        return None
    return Object(key, found["ContentLength"], found["ETag"].strip('"'), found["Metadata"].get(SHA256))


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those of [start, end).

    Raises:
        UserError: it is not there, not permitted, not to be reached, damaged, or ends before `end`.
    """
    return _read(uri, start, end)


def _read(uri: str, start: int | None = None, end: int | None = None, etag: str | None = None) -> bytes:
    bucket, key = split_uri(uri)
    if not key:
        raise UserError(f"{uri} is a bucket, not an object: check the address.")
    part = start is not None or end is not None
    begin = start or 0
    if end is not None and end <= begin:
        return b""
    arguments = {"Range": f"bytes={begin}-{'' if end is None else end - 1}"} if part else {}
    if etag is not None:
        arguments["IfMatch"] = f'"{etag}"'

    def get() -> bytes:
        answer = _get(uri, Bucket=bucket, Key=key, **arguments)
        content = answer["Body"].read()
        if len(content) != answer["ContentLength"]:
            raise MayPass("the answer was cut short")
        if part:
            # A server may send all where a part was asked for.
            content = content if "ContentRange" in answer else content[begin:end]
            if end is not None and len(content) < end - begin:
                raise UserError(f"{uri} is damaged (it ends before byte {end}): write it anew.")
        elif differs(answer, content):
            raise Damaged
        return content

    return _found(uri, "read", get)


def _get(uri: str, **arguments: Any) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    try:
        return complete(client().get_object(**arguments), "Body", "ContentLength", "Metadata")
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
            raise UserError(f"{uri} was replaced while it was read: run the same command again.") from None
        raise


def differs(answer: dict[str, Any], content: bytes) -> bool:
    """Whether all the bytes of an object are not those that were written."""
    wanted = answer["Metadata"].get(SHA256)
    return bool(wanted) and not _compared_on_arrival(answer, wanted) and sha256_of_bytes(content) != wanted


def _compared_on_arrival(answer: dict[str, Any], wanted: str) -> bool:
    """Whether boto3 has compared the bytes with this very checksum already: a second time would cost as much again."""
    from botocore.httpchecksum import StreamingChecksumBody

    sums = [
        h
        for h in answer["ResponseMetadata"]["HTTPHeaders"]
        if h.startswith("x-amz-checksum-") and h != "x-amz-checksum-type"
    ]
    return (
        isinstance(answer["Body"], StreamingChecksumBody)
        and sums == ["x-amz-checksum-sha256"]
        and base64.b64decode(answer["ChecksumSHA256"]).hex() == wanted
    )


def _found(uri: str, done: str, call: Any) -> Any:
    try:
        return patiently(uri, done, call)
    except Absent:
        raise UserError(f"{uri} cannot be {done}: there is no such object; check the address.") from None


def remove(uri: str) -> None:
    """Delete an object; one that is not there already is gone.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    bucket, key = split_uri(uri)
    _found(uri, "removed", lambda: client().delete_object(Bucket=bucket, Key=key))


class ObjectStream(io.RawIOBase):
    """An object read from its start to its end in ranges, each of which is tried again when it fails.

    The end of the stream is an error where the bytes before it were not those that were written.

    Raises:
        UserError: the object is not there, not to be reached, damaged, or replaced while it is read.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.position = uri, 0
        known = head(uri)
        if known is None:
            raise UserError(f"There is no object {uri}: check the address.")
        self.size, self._known = known.bytes, known
        self._sum = hashlib.sha256()
        self._whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._next(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        # The base class would ask for a few KB at a time.
        pieces = []
        while piece := self._next(_STREAM_BYTES):
            pieces.append(piece)
        return b"".join(pieces)

    def _next(self, size: int) -> bytes:
        end = min(self.position + size, self.size)
        if self.size <= _STREAM_BYTES:
            if self._whole is None:
                # One request, compared with its checksum, and tried again if it differs.
                self._whole = read(self.uri)
                self.size = len(self._whole)
                end = min(self.position + size, self.size)
            content = self._whole[self.position : end]
        else:
            content = _read(self.uri, self.position, end, self._known.etag)
            self._sum.update(content)
            if content and end == self.size and self._known.sha256 not in (None, self._sum.hexdigest()):
                raise UserError(
                    f"{self.uri} is damaged (its checksum differs): read it again, and if that fails too, write it anew."
                )
        self.position = end
        return content
