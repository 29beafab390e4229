"""Classifies failed requests to object storage: a reason to try again, or an error for the user.

Messages name the kind of error. They quote the server's own words only if these contain no credential,
because a server may repeat a request's headers, or an address with a password. For the same reason, errors
are raised without their cause.
"""

import re
import ssl
from typing import Any, TypeVar

from slam_asr.errors import ConfigurationError, StorageError, UserError
from slam_asr.storage.client import CHECKSUMS, SECRET_FOLDER, contains_credentials

T = TypeVar("T")

CHECKSUM_DIFFERS = "its checksum differs"
_CUT_SHORT = "the answer was cut short"
_MAX_QUOTED = 300
"""Maximum number of characters of a server's explanation that a message quotes."""


class TemporaryFailure(Exception):
    """A failure that another attempt may avoid."""


class ObjectMissing(StorageError):
    """The object does not exist."""


class ChecksumMismatch(Exception):
    """Content differs from its checksum, because of the network or because the object is damaged."""


class Damaged(StorageError):
    """An object's saved content is not what was written, so the network is not the cause."""


class CredentialsMissing(StorageError):
    """No credentials are configured, or they are incomplete."""


def require_fields(answer: dict[str, Any], *fields: str) -> dict[str, Any]:
    """Return an answer after checking that it has these fields. A truncated answer may lack some.

    Raises:
        TemporaryFailure: a field is missing.
    """
    if any(answer.get(field) is None for field in fields):
        raise TemporaryFailure(_CUT_SHORT)
    return answer


def error_code(error: Any) -> str:
    """Return the server's error code in a botocore ClientError, such as `AccessDenied`."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    # A faulty server could send any text here. Only text that looks like a code may be shown.
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else "an error without a code"


def server_words(error: Any) -> str:
    """Return the server's explanation in a botocore ClientError, in parentheses and quotes.

    The result is empty if the server gives none, or it contains a credential or unprintable characters.
    """
    words = " ".join(str(error.response.get("Error", {}).get("Message") or "").split())[:_MAX_QUOTED]
    if not words.isprintable() or contains_credentials(words):
        return ""
    return f' ("{words}")' if words else ""


def http_status(error: Any) -> int:
    """Return the HTTP status in a botocore ClientError, or 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def reason_to_retry(error: Exception, uri: str, action: str) -> str:
    """Classify an error of boto3.

    Args:
        error: raised by boto3, or by this package.
        uri: the object of the failed request, for messages.
        action: what should have happened to the object, as a past participle for messages, such as `read`.

    Returns:
        The reason for a temporary failure, in words.

    Raises:
        ObjectMissing: the object does not exist.
        UserError: the failure is permanent.
        Exception: the error itself, if it is not an error of object storage or the network.
    """
    if isinstance(error, TemporaryFailure):
        return str(error)
    # The most specific known class decides. Classes are recognised by their names, because boto3 is imported
    # only when it is used.
    names = [c.__name__ for c in type(error).__mro__]
    if "ClientError" in names:
        return _reason_of_server(error, uri, action)
    kind = next((name for name in names if name in _KINDS), None)
    if kind is None:
        raise error
    if kind == "SSLError" and _is_permanent_tls_failure(error):
        raise StorageError(
            f"{uri} cannot be reached: no secure connection to the server is possible, because its "
            "certificate is not trusted or it supports only http; check AWS_ENDPOINT_URL and AWS_CA_BUNDLE."
        ) from None
    known = _KINDS[kind]
    if isinstance(known, str):
        return known.format(name=names[0])
    error_class, message = known
    raise error_class(message.format(uri=uri, name=names[0])) from None


def _reason_of_server(error: Any, uri: str, action: str) -> str:
    """Classify an error from the server's answer, as `reason_to_retry` does."""
    code = error_code(error)
    if code in _TEMPORARY_CODES or http_status(error) in (429, 500, 502, 503, 504):
        return _TEMPORARY_CODES.get(code, "the server answers {code}").format(code=code)
    if code in ("NoSuchKey", "404", "NotFound"):
        missing = (
            "the server does not know this address" if action == "written" else "there is no such object"
        )
        raise ObjectMissing(f"{uri} cannot be {action}: {missing}; check the address.") from None
    reason = _PERMANENT_CODES.get(code, f"the server answers {code}")
    raise StorageError(
        f"{uri} cannot be {action}: {reason}{server_words(error)}; "
        "check the address, the credentials and AWS_ENDPOINT_URL."
    ) from None


def _is_permanent_tls_failure(error: Any) -> bool:
    """Return whether an SSLError is about certificates or the protocol, and would thus occur again.

    A connection that breaks during the TLS handshake raises the same class of error, but is temporary.
    """
    from urllib3.util.ssl_match_hostname import CertificateError

    # botocore's SSLError holds urllib3's, which holds the error of the ssl module.
    wrapped = getattr(error, "kwargs", {}).get("error")
    cause = wrapped.args[0] if isinstance(wrapped, Exception) and wrapped.args else None
    if isinstance(cause, ssl.SSLError):
        reason = getattr(cause, "reason", None) or ""  # OpenSSL's name, such as CERTIFICATE_VERIFY_FAILED
        return "CERTIFICATE" in reason or reason == "WRONG_VERSION_NUMBER"
    # FileNotFoundError: the file that AWS_CA_BUNDLE names does not exist.
    return isinstance(cause, CertificateError | FileNotFoundError)


def _by_name(names: dict[T, str]) -> dict[str, T]:
    """Return the meaning of each name. In `names`, the names of a meaning are a text, separated by spaces."""
    return {name: meaning for meaning, group in names.items() for name in group.split()}


_Kind = str | tuple[type[UserError], str]
_KINDS: dict[str, _Kind] = _by_name(
    {
        CHECKSUM_DIFFERS: "ChecksumMismatch FlexibleChecksumError ChecksumError",
        "no connection": "EndpointConnectionError",
        "no connection in time": "ConnectTimeoutError",
        "no connection to the proxy": "ProxyConnectionError",
        "no answer in time": "ReadTimeoutError",
        "the connection was closed": "ConnectionClosedError ConnectionResetError SSLError",
        _CUT_SHORT: "IncompleteReadError ResponseStreamingError ResponseParserError IncompleteRead "
        "BadStatusLine LineTooLong",
        "{name}": "ConnectionError HTTPClientError HTTPError TimeoutError",
        (
            CredentialsMissing,
            "{uri} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile, "
            f"or mount a secret at {SECRET_FOLDER}.",
        ): "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError",
        (
            ConfigurationError,
            "{uri} needs a valid region: set AWS_REGION.",
        ): "NoRegionError InvalidRegionError",
        (
            ConfigurationError,
            "{uri}: AWS_PROFILE names a profile that is not in the configuration files: check it.",
        ): "ProfileNotFound",
        (
            ConfigurationError,
            f"{{uri}}: {CHECKSUMS} and AWS_RESPONSE_CHECKSUM_VALIDATION must be when_supported or "
            "when_required.",
        ): "InvalidChecksumConfigError",
        (
            StorageError,
            "{uri} is not a valid address in object storage: names of objects have 1 to 1024 bytes, "
            "those of buckets 3 to 63 lower-case letters, digits, dots and dashes.",
        ): "ParamValidationError",
        # RecursionError: boto3 follows a server's redirects to other regions without limit.
        (
            StorageError,
            "{uri} cannot be reached ({name}): check AWS_ENDPOINT_URL and AWS_REGION.",
        ): "BotoCoreError Boto3Error RecursionError",
    }
)
"""For each name of an error class of Python, boto3 or urllib3: the reason to try again, or the class and the
message of the error for the user."""
_TEMPORARY_CODES = _by_name(
    {
        CHECKSUM_DIFFERS: "BadDigest InvalidDigest XAmzContentSHA256Mismatch XAmzContentChecksumMismatch",
        "the server answers {code}": "SlowDown Throttling ThrottlingException RequestLimitExceeded "
        "BandwidthLimitExceeded TooManyRequests RequestTimeout RequestTimeoutException IncompleteBody "
        "InternalError ServiceUnavailable OperationAborted ConditionalRequestConflict",
    }
)
"""For each of the server's error codes after which a new attempt may succeed: the reason to try again."""
_PERMANENT_CODES = _by_name(
    {
        "there is no such bucket": "NoSuchBucket",
        "access is denied": "AccessDenied 403 Forbidden AllAccessDisabled AccountProblem",
        "the access key is unknown": "InvalidAccessKeyId",
        "the secret key is wrong": "SignatureDoesNotMatch",
        "the session's token has expired": "ExpiredToken TokenRefreshRequired",
        "the session's token is not valid": "InvalidToken",
        # The answer to a HEAD request has no body, so the precise code is unknown.
        "the server refuses the request, as it does for an expired token or a wrong region": "400",
        "this machine's clock is more than 15 minutes off": "RequestTimeTooSkewed",
        "the bucket is in another region": "PermanentRedirect AuthorizationHeaderMalformed 301 "
        "IllegalLocationConstraintException",
        "the bucket's quota is used up": "QuotaExceeded",
        "the server's disks are full": "XMinioStorageFull 507",
        "the object's name is too long": "KeyTooLongError",
        "the bucket's name is not valid": "InvalidBucketName",
        "the object is archived, and must be restored first": "InvalidObjectState",
        "it is shorter than expected": "InvalidRange 416",
        "it is larger than the server accepts": "EntityTooLarge",
    }
)
"""For each of the server's error codes after which a new attempt is useless: its meaning."""
