"""Objects behind `s3://bucket/key`, through boto3: AWS, MinIO, SeaweedFS, Ceph and others.

Endpoint, region and credentials come from where AWS tools look for them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID` and so on, configuration files, the machine's or the pod's role), or from a
Kubernetes secret that is mounted as a folder; see `SECRET`.

What may pass (5xx, throttling, time-outs, resets, bodies cut short) is tried again with growing
pauses for `PATIENCE` seconds; what will not (403, 404) is said at once. Objects written here carry
the SHA-256 of their bytes, which is compared whenever they are read.
"""

import contextlib
import functools
import hashlib
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slam_asr.errors import UserError
from slam_asr.progress import say
from slam_asr.storage.local import sha256_of_bytes

SCHEME = "s3://"

SECRET = "SLAM_ASR_S3_SECRET"
"""Environment variable that names the folder of a mounted secret, if it is not at `SECRET_FOLDER`."""
SECRET_FOLDER = "/var/run/secrets/slam-asr/s3"
_SECRET_KEYS = {
    "aws_access_key_id": ("AWS_ACCESS_KEY_ID", "accesskey"),
    "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY", "secretkey"),
    "aws_session_token": ("AWS_SESSION_TOKEN",),
    "region_name": ("AWS_REGION", "AWS_DEFAULT_REGION", "region"),
    "endpoint_url": ("AWS_ENDPOINT_URL", "endpoint"),
}
"""Files in it: AWS's own names, or those of the secret that Kubeflow Pipelines makes (`accesskey`, `secretkey`)."""

PATIENCE = "SLAM_ASR_S3_PATIENCE"
"""Environment variable: for how many seconds what may pass is tried again."""
DEFAULT_PATIENCE = 120.0

PART_BYTES = 16 * 2**20
"""Size of a piece of a parallel transfer; S3's limit of 10 000 parts then allows 160 GB an object."""
_PARALLEL = 8
_SHA256 = "sha256"
"""Name of the metadata that holds the checksum of an object written here."""
_TRANSIENT_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests",
    "RequestTimeout", "RequestTimeoutException", "InternalError", "ServiceUnavailable", "503", "500", "502", "504", "429",
    # The object was replaced between two pieces of one reading.
    "PreconditionFailed",
}


@dataclass(frozen=True)
class Object:
    """An object in a bucket."""

    key: str
    bytes: int
    etag: str
    """Changes with the content."""
    sha256: str | None = None
    """Of the content, where the object was written here and was asked for by itself."""


class _Damaged(Exception):
    """Content differs from its checksum or size: perhaps on the way, perhaps where it lies."""


class AlreadyThere(Exception):
    """Another writer was first."""


def is_s3(path: str | os.PathLike) -> bool:
    """Whether a path lies in object storage."""
    return os.fspath(path).startswith(SCHEME)


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` → bucket and key.

    Raises:
        UserError: there is no bucket's name in it.
    """
    if "@" in uri.removeprefix(SCHEME).partition("/")[0]:
        raise UserError("An s3:// address holds a name or password before its bucket: take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    found = re.fullmatch(r"s3://([a-zA-Z0-9][a-zA-Z0-9._-]+)/?(.*)", uri, re.DOTALL)
    if not found:
        raise UserError(f"{uri} is no address in object storage: write it as s3://bucket/prefix.")
    return found[1], found[2]


def list_objects(uri: str) -> Iterator[Object]:
    """The object of this address, or all below it as below a folder, by key; none where there is nothing.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    bucket, prefix = split_uri(uri)
    folder = prefix.rstrip("/") + "/" if prefix else ""
    arguments = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = _patiently(uri, "listed", lambda: _client().list_objects_v2(**arguments))
        for found in page.get("Contents", []):
            if found["Key"] == prefix or found["Key"].startswith(folder):
                yield Object(found["Key"], found["Size"], found["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below a prefix, in order."""
    bucket, prefix = split_uri(uri)
    folder = prefix.rstrip("/") + "/" if prefix else ""
    arguments = {"Bucket": bucket, "Prefix": folder, "Delimiter": "/"}
    names: list[str] = []
    while True:
        page = _patiently(uri, "listed", lambda: _client().list_objects_v2(**arguments))
        names += [p["Prefix"].removeprefix(folder).rstrip("/") for p in page.get("CommonPrefixes", [])]
        if not page.get("IsTruncated"):
            return names
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def head(uri: str) -> Object | None:
    """What is known of one object, or None where there is none."""
    bucket, key = split_uri(uri)
    if not key:
        return None
    found = _patiently(uri, "read", lambda: _client().head_object(Bucket=bucket, Key=key), absent_is_none=True)
    if found is None:
        return None
    return Object(key, found["ContentLength"], found["ETag"].strip('"'), found.get("Metadata", {}).get(_SHA256))


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those of [start, end).

    Raises:
        UserError: it is not there, not permitted, not to be reached, or damaged.
    """
    bucket, key = split_uri(uri)
    part = {} if start is None else {"Range": f"bytes={start}-{end - 1}"}

    def get() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key, **part)
        content = answer["Body"].read()
        wanted = answer.get("Metadata", {}).get(_SHA256)
        if len(content) != answer["ContentLength"] or (part and len(content) != end - start):
            raise _Damaged(f"{len(content)} bytes of it arrived")
        if not part and wanted and sha256_of_bytes(content) != wanted:
            raise _Damaged("its checksum differs")
        return content

    return _patiently(uri, "read", get)


def download(uri: str, file: BinaryIO, sha256: str | None = None, report: Callable[[int], None] | None = None) -> None:
    """Fetch an object in parallel pieces, and compare its checksum.

    Args:
        uri: of the object.
        file: opened for reading and writing; it is overwritten.
        sha256: of the content; that which the object carries if not given.
        report: called with the number of bytes of each piece that arrives, by several threads.

    Raises:
        UserError: the object is gone, not permitted, not to be reached, or damaged.
    """
    bucket, key = split_uri(uri)
    known = head(uri)
    if known is None:
        raise UserError(f"There is no object {uri}: check the address.")
    wanted = sha256 or known.sha256

    def get() -> None:
        file.seek(0)
        _client().download_fileobj(bucket, key, file, Config=_transfer(), Callback=report)
        file.flush()
        if file.seek(0, os.SEEK_END) < known.bytes:
            raise _Damaged("it arrived cut short")
        file.truncate(known.bytes)
        file.seek(0)
        if wanted and hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise _Damaged("its checksum differs")

    _patiently(uri, "read", get)


def write(uri: str, content: bytes | memoryview, only_if_absent: bool = False) -> None:
    """Publish bytes as an object, at once and whole.

    Raises:
        AlreadyThere: it was to be written only if absent, and is there.
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    bucket, key = split_uri(uri)
    sha256 = sha256_of_bytes(content)
    if not only_if_absent:
        upload(uri, io.BytesIO(content), sha256)
        return
    put = functools.partial(_client().put_object, Bucket=bucket, Key=key, Body=bytes(content), Metadata={_SHA256: sha256})

    def put_first() -> None:
        from botocore.exceptions import ClientError

        try:
            put(IfNoneMatch="*")
        except ClientError as error:
            code = _code(error)
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                known = head(uri)
                if known is not None and known.sha256 == sha256:
                    return  # an earlier try of ours, whose answer was lost
                raise AlreadyThere(uri) from None
            if code not in ("NotImplemented", "501", "InvalidArgument", "InvalidRequest"):
                raise
            # A server without conditional writes: the last of several writers wins.
            if head(uri) is not None:
                raise AlreadyThere(uri) from None
            put()

    _patiently(uri, "written", put_first)


def upload(uri: str, file: BinaryIO, sha256: str | None = None, report: Callable[[int], None] | None = None) -> None:
    """Publish a file as an object, in parallel pieces where it is large; it is visible when all are there.

    Args:
        uri: of the object; one that is there is replaced.
        file: opened for reading.
        sha256: of the content; computed if not given.
        report: called with the number of bytes of each piece that was sent, by several threads.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    bucket, key = split_uri(uri)
    file.seek(0)
    sha256 = sha256 or hashlib.file_digest(file, "sha256").hexdigest()
    size = file.seek(0, os.SEEK_END)

    def put() -> None:
        file.seek(0)
        # boto3 closes what it was given.
        _client().upload_fileobj(
            _Unclosed(file), bucket, key, ExtraArgs={"Metadata": {_SHA256: sha256}}, Config=_transfer(), Callback=report
        )
        known = _client().head_object(Bucket=bucket, Key=key)
        if known["ContentLength"] != size:
            raise _Damaged(f"{known['ContentLength']} of {size} bytes arrived there")

    _patiently(uri, "written", put)


class _Unclosed:
    """A file that whoever uses it cannot close."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell

    def close(self) -> None:
        pass


def remove(uri: str) -> None:
    """Delete an object; one that is not there already is gone."""
    bucket, key = split_uri(uri)
    _patiently(uri, "removed", lambda: _client().delete_object(Bucket=bucket, Key=key))


class ObjectStream(io.RawIOBase):
    """An object read from its start to its end in ranges, each of which is tried again when it fails.

    Raises:
        UserError: the object is not there.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.position = uri, 0
        known = head(uri)
        if known is None:
            raise UserError(f"There is no object {uri}: check the address.")
        self.size = known.bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        end = min(self.position + len(buffer), self.size)
        if end == self.position:
            return 0
        content = read(self.uri, self.position, end)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def patience() -> float:
    """Seconds for which what may pass is tried again.

    Raises:
        UserError: the environment variable is no number.
    """
    said = os.environ.get(PATIENCE, "")
    try:
        return float(said) if said else DEFAULT_PATIENCE
    except ValueError:
        raise UserError(f"{PATIENCE} is {said!r}: give a number of seconds.") from None


def _patiently(uri: str, done: str, call: Callable[[], Any], absent_is_none: bool = False) -> Any:
    """Call until it works, fails for good, or has failed for as long as `patience` allows."""
    started = time.monotonic()
    damaged = 0
    for attempt in range(1_000_000):
        try:
            with _sentences(uri, done):
                return call()
        except _Absent as error:
            if absent_is_none:
                return None
            raise UserError(str(error)) from error
        except _Damaged as error:
            # Once may be the way; twice is where it lies.
            damaged += 1
            if damaged > 2:
                raise UserError(f"{uri} is damaged ({error}): write it anew.") from error
            reason = str(error)
        except _MayPass as error:
            reason = str(error)
        tried = time.monotonic() - started
        limit = patience()
        if tried >= limit:
            raise UserError(
                f"{uri} could not be {done} in {tried:.0f} s of trying ({reason}): check the network and AWS_ENDPOINT_URL, and run the same "
                f"command again; {PATIENCE} sets how long is tried."
            )
        pause = min(0.1 * 2**attempt, 10.0, limit - tried) * random.uniform(0.5, 1.0)
        if tried > 5:
            say(f"{uri}: {reason}; trying for another {limit - tried:.0f} s")
        time.sleep(pause)


class _MayPass(Exception):
    """A failure that another try may not meet."""


class _Absent(Exception):
    """There is no such object."""


@contextlib.contextmanager
def _sentences(uri: str, done: str) -> Iterator[None]:
    """Sort boto3's many errors: what may pass, what is absent, and a sentence for each of the rest.

    Only an error's code is repeated, never its text, which may hold a request's headers.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError) as error:
        raise UserError(
            f"{uri} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile, or mount a secret at {SECRET_FOLDER}."
        ) from error
    except boto.NoRegionError as error:
        raise UserError(f"{uri} needs a region: set AWS_REGION.") from error
    except boto.ProfileNotFound as error:
        raise UserError(f"{uri}: AWS_PROFILE names a profile that is not in the configuration files: check it.") from error
    except boto.ClientError as error:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _TRANSIENT_CODES or status >= 500 or status == 429:
            raise _MayPass(f"the server answers {code}") from error
        why = _REASONS.get(code)
        if code in ("NoSuchKey", "404", "NotFound"):
            raise _Absent(f"{uri} cannot be {done}: there is no such object; check the address.") from error
        raise UserError(
            f"{uri} cannot be {done}: {why or f'the server answers {code}'}; check the address, the credentials and AWS_ENDPOINT_URL."
        ) from error
    except (boto.SSLError, boto.ProxyConnectionError) as error:
        raise UserError(f"{uri} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL, certificates and proxies.") from error
    except (boto.HTTPClientError, boto.IncompleteReadError, boto.ChecksumError, boto.FlexibleChecksumError, RetriesExceededError, ResponseParserError, ConnectionError, TimeoutError) as error:
        raise _MayPass(_FAULTS.get(type(error).__name__, type(error).__name__)) from error
    except boto.ParamValidationError as error:
        raise UserError(f"{uri} is no valid address in object storage: names of objects have 1 to 1024 bytes, those of buckets 3 to 63 small letters, digits, dots and dashes.") from error
    except (boto.BotoCoreError, Boto3Error, ValueError) as error:
        if isinstance(error, ValueError) and "endpoint" not in str(error).lower():
            raise
        raise UserError(f"{uri} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL and AWS_REGION.") from error


_REASONS = {
    "NoSuchBucket": "there is no such bucket", "AccessDenied": "access is denied", "403": "access is denied", "Forbidden": "access is denied",
    "InvalidAccessKeyId": "the access key is unknown", "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session's token has expired", "InvalidToken": "the session's token is not valid",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off",
    "PermanentRedirect": "the bucket lies in another region", "AuthorizationHeaderMalformed": "the bucket lies in another region",
    "XAmzContentSHA256Mismatch": "the server does not know this checksum", "QuotaExceeded": "the bucket's quota is used up",
    "XMinioStorageFull": "the server's disks are full", "KeyTooLongError": "the object's name is too long",
}
_FAULTS = {
    "EndpointConnectionError": "no connection", "ConnectTimeoutError": "no connection in time", "ReadTimeoutError": "no answer in time",
    "ConnectionClosedError": "the connection was closed", "IncompleteReadError": "the answer was cut short",
    "ResponseStreamingError": "the answer was cut short", "ResponseParserError": "the answer was cut short",
    "RetriesExceededError": "the answer was cut short many times", "FlexibleChecksumError": "the answer was damaged on the way",
}


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) or "an error without a code"


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=_PARALLEL, num_download_attempts=10
    )


_clients: dict[tuple, Any] = {}
_making = threading.Lock()


def _client() -> Any:
    """The client for the credentials of the moment; threads share it, forked processes do not."""
    from botocore.config import Config

    arguments = _mounted_secret()
    ambient = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "HOME"))
    key = (os.getpid(), ambient, tuple(sorted(arguments.items())))
    with _making:
        if key not in _clients:
            import boto3

            endpoint = arguments.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            if "@" in endpoint:
                raise UserError("AWS_ENDPOINT_URL holds a name or password: take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
            # Within one call, quick tries; `_patiently` has the long breath. A part of a parallel transfer has
            # only these.
            config = Config(
                retries={"mode": "standard", "total_max_attempts": 5}, connect_timeout=5, read_timeout=30,
                max_pool_connections=4 * _PARALLEL, user_agent_extra="slam-asr",
            )
            _clients.clear()
            # A session of its own: the default one keeps the credentials that it saw first.
            _clients[key] = boto3.session.Session().client("s3", config=config, **arguments)
        return _clients[key]


def _mounted_secret() -> dict[str, str]:
    """Arguments for the client from a mounted secret; what the environment says comes first."""
    folder = Path(os.environ.get(SECRET) or SECRET_FOLDER)
    if not folder.is_dir():
        if os.environ.get(SECRET):
            raise UserError(f"{SECRET} names {folder}, which is no folder: mount the secret there, or unset it.")
        return {}
    found: dict[str, str] = {}
    for argument, names in _SECRET_KEYS.items():
        if any(os.environ.get(name) for name in names):
            continue
        for name in names:
            with contextlib.suppress(OSError):
                found[argument] = (folder / name).read_text().strip()
                break
    if "endpoint_url" in found and "://" not in found["endpoint_url"]:
        found["endpoint_url"] = f"http://{found['endpoint_url']}"
    return found
