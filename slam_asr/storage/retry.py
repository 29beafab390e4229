"""Retries of requests to object storage, and the error message for each failure.

Failures that may be temporary (5xx, throttling, time-outs, resets, truncated answers) are retried with
growing pauses for `PATIENCE` seconds. Permanent ones (403, 404) are raised at once.

Messages name only the kind of an error and never repeat its text, which may hold a request's headers or an
address with a password. For the same reason, errors are raised without their cause (`from None`).
"""

import http.client
import random
import re
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar

from slam_asr.errors import ConfigurationError, StorageError, UserError
from slam_asr.progress import log_line
from slam_asr.storage.client import SECRET_FOLDER, seconds_from_environment

T = TypeVar("T")

PATIENCE = "SLAM_ASR_S3_PATIENCE"
"""Environment variable: seconds for which temporary failures are retried."""
DEFAULT_PATIENCE = 120.0
_FIRST_PAUSE, _MAX_PAUSE = 0.1, 10.0
"""Seconds."""
_SILENT_SECONDS = 5.0
"""Seconds of retries before the first log line; most temporary failures are over by then."""
_MAX_CHECKSUM_FAILURES = 3
"""The network may cause a single failure; after this many, the object itself counts as damaged."""
CHECKSUM_DIFFERS = "its checksum differs"


class TemporaryFailure(Exception):
    """A failure that another attempt may avoid."""


class ObjectMissing(Exception):
    """The object does not exist."""


class ChecksumMismatch(Exception):
    """Content differs from its checksum, because of the network or because the object is damaged."""


class CredentialsMissing(StorageError):
    """No credentials are configured, or they are incomplete."""


def patience() -> float:
    """Seconds for which temporary failures are retried.

    Raises:
        ConfigurationError: the environment variable is not a number.
    """
    return seconds_from_environment(PATIENCE, DEFAULT_PATIENCE)


def call_with_retries(uri: str, action: str, call: Callable[[], T]) -> T:
    """Repeat a call until it succeeds, fails permanently, or has failed for `patience()` seconds.

    Args:
        uri: of the object or bucket, for the message.
        action: what the call does, for the message: "read", "written", "listed" or "removed".
        call: may be called many times.

    Returns:
        The result of the call.

    Raises:
        ObjectMissing: the object does not exist.
        UserError: the call failed permanently, or for too long.
    """
    limit = patience()
    started = time.monotonic()
    attempt = checksum_failures = 0
    while True:
        try:
            return call()
        except (UserError, ObjectMissing):
            raise
        except Exception as error:
            reason = _reason_to_retry(error, uri, action)
            checksum_failures += reason == CHECKSUM_DIFFERS
        if checksum_failures >= _MAX_CHECKSUM_FAILURES:
            state, remedy = (
                ("is damaged", "write it again")
                if action == "read"
                else ("arrives damaged", "check the network")
            )
            raise StorageError(f"{uri} {state} ({reason}, {checksum_failures} times): {remedy}.")
        elapsed = time.monotonic() - started
        if elapsed >= limit:
            raise StorageError(
                f"{uri} could not be {action} in {elapsed:.0f} s of trying ({reason}): check the network "
                f"and AWS_ENDPOINT_URL, and run the same command again; {PATIENCE} sets the time limit."
            )
        # The exponent is limited, because after a thousand attempts the power would exceed a float.
        pause = min(_FIRST_PAUSE * 2 ** min(attempt, 10), _MAX_PAUSE, limit - elapsed)
        attempt += 1
        if elapsed > _SILENT_SECONDS:
            log_line(f"{uri}: {reason}; trying for another {limit - elapsed:.0f} s")
        # Random pauses keep the programs of a cluster from retrying all at once.
        time.sleep(pause * random.uniform(0.5, 1.0))


def require_fields(answer: dict[str, Any], *fields: str) -> dict[str, Any]:
    """Return an answer, after checking that it has these fields: a truncated answer may lack some.

    Raises:
        TemporaryFailure: a field is missing.
    """
    if any(answer.get(field) is None for field in fields):
        raise TemporaryFailure("the answer was cut short")
    return answer


def error_code(error: Any) -> str:
    """The server's error code in a botocore ClientError, such as `AccessDenied`."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    # A faulty server could put anything here; only what looks like a code may be shown.
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else "an error without a code"


def http_status(error: Any) -> int:
    """The HTTP status in a botocore ClientError, or 0."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason_to_retry(error: Exception, uri: str, action: str) -> str:
    """Classify an error of boto3.

    Returns:
        The reason of a temporary failure, in words.

    Raises:
        ObjectMissing: the object does not exist.
        UserError: the failure is permanent.
        Exception: the error itself, if it has nothing to do with object storage.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    # The order matters: most of botocore's errors are subclasses of BotoCoreError, which is checked last.
    if isinstance(error, TemporaryFailure):
        return str(error)
    if isinstance(error, ChecksumMismatch | boto.FlexibleChecksumError | boto.ChecksumError):
        return CHECKSUM_DIFFERS
    if isinstance(error, boto.ClientError):
        return _reason_of_server(error, uri, action)
    if isinstance(error, boto.SSLError) and _is_permanent_tls_failure(error):
        raise StorageError(
            f"{uri} cannot be reached: no secure connection to the server is possible, because its "
            "certificate is not trusted or it supports only http; check AWS_ENDPOINT_URL and AWS_CA_BUNDLE."
        ) from None
    if isinstance(
        error,
        boto.ConnectionError
        | boto.HTTPClientError
        | boto.IncompleteReadError
        | HTTPError
        | ConnectionError
        | TimeoutError,
    ):
        return _CONNECTION_FAILURES.get(type(error).__name__, type(error).__name__)
    if isinstance(
        error,
        ResponseParserError
        | http.client.IncompleteRead
        | http.client.BadStatusLine
        | http.client.LineTooLong,
    ):
        return "the answer was cut short"
    if isinstance(
        error,
        boto.NoCredentialsError
        | boto.PartialCredentialsError
        | boto.CredentialRetrievalError
        | boto.TokenRetrievalError,
    ):
        raise CredentialsMissing(
            f"{uri} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile, "
            f"or mount a secret at {SECRET_FOLDER}."
        ) from None
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        raise ConfigurationError(f"{uri} needs a valid region: set AWS_REGION.") from None
    if isinstance(error, boto.ProfileNotFound):
        raise ConfigurationError(
            f"{uri}: AWS_PROFILE names a profile that is not in the configuration files: check it."
        ) from None
    if isinstance(error, boto.ParamValidationError):
        raise StorageError(
            f"{uri} is not a valid address in object storage: names of objects have 1 to 1024 bytes, "
            "those of buckets 3 to 63 lower-case letters, digits, dots and dashes."
        ) from None
    # RecursionError: boto3 follows a server's redirects to other regions without limit.
    if isinstance(error, boto.BotoCoreError | Boto3Error | RecursionError):
        raise StorageError(
            f"{uri} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL and AWS_REGION."
        ) from None
    raise error


def _reason_of_server(error: Any, uri: str, action: str) -> str:
    """Classify an error from the server's answer, as `_reason_to_retry` does."""
    code = error_code(error)
    if code in _CHECKSUM_CODES:
        return CHECKSUM_DIFFERS
    if code in _TEMPORARY_CODES or http_status(error) in (429, 500, 502, 503, 504):
        return f"the server answers {code}"
    if code in ("NoSuchKey", "404", "NotFound"):
        raise ObjectMissing(uri) from None
    reason = _PERMANENT_CODES.get(code, f"the server answers {code}")
    raise StorageError(
        f"{uri} cannot be {action}: {reason}; check the address, the credentials and AWS_ENDPOINT_URL."
    ) from None


def _is_permanent_tls_failure(error: Any) -> bool:
    """Whether a botocore SSLError is about certificates or the protocol.

    A connection that breaks during the TLS handshake raises the same class of error, but is temporary.
    """
    from urllib3.util.ssl_match_hostname import CertificateError

    # botocore's SSLError holds urllib3's, which holds the error of the ssl module.
    wrapped = error.kwargs.get("error")
    cause = wrapped.args[0] if isinstance(wrapped, Exception) and wrapped.args else None
    if isinstance(cause, ssl.SSLError):
        reason = getattr(cause, "reason", None) or ""  # OpenSSL's name, such as CERTIFICATE_VERIFY_FAILED
        return "CERTIFICATE" in reason or reason == "WRONG_VERSION_NUMBER"
    # FileNotFoundError: the file that AWS_CA_BUNDLE names does not exist.
    return isinstance(cause, CertificateError | FileNotFoundError)


_TEMPORARY_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "TooManyRequests",
    "RequestTimeout",
    "RequestTimeoutException",
    "IncompleteBody",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_CHECKSUM_CODES = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_PERMANENT_CODES = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied",
    "403": "access is denied",
    "Forbidden": "access is denied",
    "AllAccessDisabled": "access is denied",
    "AccountProblem": "access is denied",
    "InvalidAccessKeyId": "the access key is unknown",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session's token has expired",
    "InvalidToken": "the session's token is not valid",
    "TokenRefreshRequired": "the session's token has expired",
    # The answer to a HEAD request has no body, so the precise code is unknown.
    "400": "the server refuses the request, as it does for an expired token or a wrong region",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off",
    "PermanentRedirect": "the bucket is in another region",
    "AuthorizationHeaderMalformed": "the bucket is in another region",
    "301": "the bucket is in another region",
    "IllegalLocationConstraintException": "the bucket is in another region",
    "QuotaExceeded": "the bucket's quota is used up",
    "XMinioStorageFull": "the server's disks are full",
    "507": "the server's disks are full",
    "KeyTooLongError": "the object's name is too long",
    "InvalidBucketName": "the bucket's name is not valid",
    "InvalidObjectState": "the object is archived, and must be restored first",
    "InvalidRange": "it is shorter than expected",
    "416": "it is shorter than expected",
    "EntityTooLarge": "it is larger than the server accepts",
}
_CONNECTION_FAILURES = {
    "EndpointConnectionError": "no connection",
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeoutError": "no answer in time",
    "ConnectionClosedError": "the connection was closed",
    "ProxyConnectionError": "no connection to the proxy",
    "SSLError": "the connection was closed",
    "IncompleteReadError": "the answer was cut short",
    "ResponseStreamingError": "the answer was cut short",
    "ConnectionResetError": "the connection was closed",
}
"""Descriptions by class name, since boto3 is imported only when it is used."""
