"""What is tried again, for how long, and the sentence for each of the rest.

What may pass (5xx, throttling, time-outs, resets, answers cut short) is tried again with growing
pauses for `PATIENCE` seconds; what will not (403, 404) is said at once.

Only an error's kind is repeated, never its text, which may hold a request's headers or an address
with a password in it. For that reason, too, errors are raised without their cause.
"""

import random
import re
import time
from collections.abc import Callable
from typing import Any

from slam_asr.errors import UserError
from slam_asr.progress import log_line
from slam_asr.storage.client import SECRET_FOLDER, seconds_from

PATIENCE = "SLAM_ASR_S3_PATIENCE"
"""Environment variable: for how many seconds what may pass is tried again."""
DEFAULT_PATIENCE = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_QUIET = 5.0
"""Seconds of trying before it is mentioned: most of what passes has passed by then."""
_DAMAGED_TRIES = 3
"""Once may be the way; this often is where it lies."""
DIFFERS = "its checksum differs"


class MayPass(Exception):
    """A failure that another try may not meet."""


class Absent(Exception):
    """There is no such object."""


class Damaged(Exception):
    """Content differs from its checksum: perhaps on the way, perhaps where it lies."""


def patience() -> float:
    """Seconds for which what may pass is tried again.

    Raises:
        UserError: the environment variable is no number.
    """
    return seconds_from(PATIENCE, DEFAULT_PATIENCE)


def patiently(uri: str, done: str, call: Callable[[], Any]) -> Any:
    """Call until it works, fails for good, or has failed for as long as `patience` allows.

    Args:
        uri: that the call is about, for the sentence.
        done: what happens to it there: "read", "written".
        call: may be called many times.

    Raises:
        Absent: there is no such object.
        UserError: it fails for good, or for too long.
    """
    limit = patience()
    started = time.monotonic()
    attempt = damaged = 0
    while True:
        try:
            return call()
        except (UserError, Absent):
            raise
        except Exception as error:
            reason = _reason_to_try_again(error, uri, done)
            damaged += reason == DIFFERS
        if damaged >= _DAMAGED_TRIES:
            way, remedy = (
                ("is damaged", "write it anew")
                if done == "read"
                else ("arrives damaged", "check the network")
            )
            raise UserError(f"{uri} {way} ({reason}, {damaged} times): {remedy}.")
        tried = time.monotonic() - started
        if tried >= limit:
            raise UserError(
                f"{uri} could not be {done} in {tried:.0f} s of trying ({reason}): check the network and AWS_ENDPOINT_URL, and run the same "
                f"command again; {PATIENCE} sets how long is tried."
            )
        pause = min(_FIRST_PAUSE * 2 ** min(attempt, 10), _LONGEST_PAUSE, limit - tried)
        attempt += 1
        if tried > _QUIET:
            log_line(f"{uri}: {reason}; trying for another {limit - tried:.0f} s")
        # Chance keeps the programs of a cluster from coming back all at once.
        time.sleep(pause * random.uniform(0.5, 1.0))


def complete(answer: dict[str, Any], *fields: str) -> dict[str, Any]:
    """An answer, after checking that it was not cut short before these fields.

    Raises:
        MayPass: one of them is missing.
    """
    if any(answer.get(field) is None for field in fields):
        raise MayPass("the answer was cut short")
    return answer


def code_of(error: Any) -> str:
    """The server's word for what is wrong."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else "an error without a code"


def _reason_to_try_again(error: Exception, uri: str, done: str) -> str:
    """Sort boto3's many errors: why it may pass, or raise what is to be said.

    Raises:
        Absent: there is no such object.
        UserError: it will not pass.
        Exception: the error itself, where it is none of object storage's.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError

    if isinstance(error, MayPass):
        return str(error)
    if isinstance(error, Damaged | boto.FlexibleChecksumError | boto.ChecksumError):
        return DIFFERS
    if isinstance(error, boto.ClientError):
        return _reason_of_server(error, uri, done)
    if isinstance(error, boto.SSLError) and _is_about_certificates(error):
        raise UserError(
            f"{uri} cannot be reached: there is no secure connection to the server, whose certificate is not trusted or which speaks http only; "
            "check AWS_ENDPOINT_URL and AWS_CA_BUNDLE."
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
        return _FAULTS.get(type(error).__name__, type(error).__name__)
    if type(error).__name__ in (
        "ResponseParserError",
        "IncompleteRead",
        "BadStatusLine",
        "RemoteDisconnected",
        "LineTooLong",
    ):
        return "the answer was cut short"
    if isinstance(
        error,
        boto.NoCredentialsError
        | boto.PartialCredentialsError
        | boto.CredentialRetrievalError
        | boto.TokenRetrievalError,
    ):
        raise UserError(
            f"{uri} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile, or mount a secret at {SECRET_FOLDER}."
        ) from None
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        raise UserError(f"{uri} needs a valid region: set AWS_REGION.") from None
    if isinstance(error, boto.ProfileNotFound):
        raise UserError(
            f"{uri}: AWS_PROFILE names a profile that is not in the configuration files: check it."
        ) from None
    if isinstance(error, boto.ParamValidationError):
        raise UserError(
            f"{uri} is no valid address in object storage: names of objects have 1 to 1024 bytes, those of buckets 3 to 63 small letters, digits, dots and dashes."
        ) from None
    # boto3 follows a server that sends it to another region for ever.
    if isinstance(error, boto.BotoCoreError | Boto3Error | RecursionError):
        raise UserError(
            f"{uri} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL and AWS_REGION."
        ) from None
    raise error


def _reason_of_server(error: Any, uri: str, done: str) -> str:
    code = code_of(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _NOT_AS_SENT:
        return DIFFERS
    if code in _TRANSIENT or status in (429, 500, 502, 503, 504):
        return f"the server answers {code}"
    if code in ("NoSuchKey", "404", "NotFound"):
        raise Absent(uri) from None
    why = _REASONS.get(code, f"the server answers {code}")
    raise UserError(
        f"{uri} cannot be {done}: {why}; check the address, the credentials and AWS_ENDPOINT_URL."
    ) from None


def _is_about_certificates(error: Exception) -> bool:
    # A connection that breaks while it is being secured is the same kind of error, and passes.
    return any(
        sign in str(error) for sign in ("CERTIFICATE", "certificate", "WRONG_VERSION_NUMBER", "No such file")
    )


_TRANSIENT = {
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
_NOT_AS_SENT = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_REASONS = {
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
    # An answer to HEAD has no body that says which of them.
    "400": "the server refuses the request, as it does for an expired token or a wrong region",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off",
    "PermanentRedirect": "the bucket lies in another region",
    "AuthorizationHeaderMalformed": "the bucket lies in another region",
    "301": "the bucket lies in another region",
    "IllegalLocationConstraintException": "the bucket lies in another region",
    "QuotaExceeded": "the bucket's quota is used up",
    "XMinioStorageFull": "the server's disks are full",
    "507": "the server's disks are full",
    "KeyTooLongError": "the object's name is too long",
    "InvalidBucketName": "that is no bucket's name",
    "InvalidObjectState": "the object is archived, and must be restored first",
    "InvalidRange": "it is shorter than was expected",
    "416": "it is shorter than was expected",
    "EntityTooLarge": "it is larger than the server takes",
}
_FAULTS = {
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
