"""boto3's client: its credentials, region, endpoint and time-outs.

Credentials, region and endpoint come from the places in which AWS tools look for them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID` and so on, configuration files, the role of the machine or pod), or from a Kubernetes
secret that is mounted as a folder (see `SECRET`). Each call of `client` looks them up, so a running program
notices a changed secret.
"""

import contextlib
import functools
import os
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slam_asr.errors import ConfigurationError

SECRET = "SLAM_ASR_S3_SECRET"
"""Environment variable with the folder of a mounted secret, if it is not `SECRET_FOLDER`."""
SECRET_FOLDER = "/var/run/secrets/slam-asr/s3"

_FileNames = dict[str, tuple[str, ...]]
"""For each argument of boto3's client, the names of the secret's files that may hold its value. A file has
the name of AWS's variable, or a short name: `accesskey`, `secretkey`, `region` or `endpoint`. The first two
are the names in the secret that Kubeflow Pipelines creates."""
_CREDENTIALS: _FileNames = {
    "aws_access_key_id": ("AWS_ACCESS_KEY_ID", "accesskey"),
    "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY", "secretkey"),
    "aws_session_token": ("AWS_SESSION_TOKEN",),
}
_LOCATION: _FileNames = {
    "region_name": ("AWS_REGION", "AWS_DEFAULT_REGION", "region"),
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "endpoint"),
}

TIMEOUT = "SLAM_ASR_S3_TIMEOUT"
"""Environment variable: seconds without an answer after which a request fails."""
DEFAULT_TIMEOUT = 30.0
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
"""boto3's environment variable. `when_required` stops optional checksums, for servers that refuse them."""
_WHEN_REQUIRED = "when_required"
_CONNECT_TIMEOUT = 5.0
# The maximum number of pieces in transfer: 8 files (`paths.PARALLEL_FILES`) with 8 pieces each. urllib3
# closes every connection beyond this number after a single request.
_MAX_CONNECTIONS = 64


def seconds_from_environment(variable: str, default: float) -> float:
    """Read a number of seconds from an environment variable, or return the default if it is not set.

    Raises:
        ConfigurationError: the variable is not a number, or is negative.
    """
    text = os.environ.get(variable, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = float("nan")
    if not seconds >= 0:  # true for NaN as well
        raise ConfigurationError(f"{variable} is {text!r}: give a number of seconds.")
    return seconds


def client(checksums: bool = True) -> Any:
    """Return the client for the current credentials. Threads share it.

    Args:
        checksums: whether the client may send checksums. It sends none if the environment forbids them, or
            after `remember_refusal`.

    Raises:
        ConfigurationError: the mounted secret, the time-out or the endpoint's address is not valid.
        BotoCoreError: boto3 refuses its configuration, such as the region or the profile; see `failures`.
    """
    settings = _settings()
    # One thread creates the client while the others wait. Creating it takes 0.1 s of computation, but 1.7 s
    # if eight threads do so at once; and sessions are not thread-safe:
    # https://github.com/boto/boto3/issues/801.
    with _creation_lock(os.getpid()):
        return _create(*settings, checksums and settings not in _REFUSALS)


def sends_checksums(connection: Any) -> bool:
    """Return whether a client computes checksums for requests that do not require them."""
    return bool(connection.meta.config.request_checksum_calculation != _WHEN_REQUIRED)


def remember_refusal() -> None:
    """Send no more checksums with the current settings, because their server refuses them."""
    _REFUSALS.add(_settings())


_Settings = tuple[tuple[object, ...], tuple[tuple[str, str], ...], float]
_REFUSALS: set[_Settings] = set()
"""Settings with which a server has refused checksums."""


def _settings() -> _Settings:
    """Return all settings of a client: those that boto3 reads itself, the arguments, and the time-out in s.

    Raises:
        ConfigurationError: the mounted secret or the time-out is not valid.
    """
    arguments = _mounted_secret()
    # boto3 reads only AWS_DEFAULT_REGION.
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        arguments["region_name"] = region
    # urllib3 refuses a time-out of 0.
    timeout = max(seconds_from_environment(TIMEOUT, DEFAULT_TIMEOUT), 0.001)
    # HOME decides where boto3 looks for its configuration files.
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "HOME"))
    # boto3 reads these only when a client is created, so a client is valid only for these values.
    valid_for = (environment, _credentials_file(), os.getpid())
    return valid_for, tuple(sorted(arguments.items())), timeout


def contains_credentials(text: str) -> bool:
    """Return whether a text contains a password, or a credential of the environment or the mounted secret.

    Raises:
        ConfigurationError: the mounted secret is not valid.
    """
    arguments = _mounted_secret()
    known = [os.environ.get(name.upper()) or arguments.get(name) for name in _CREDENTIALS]
    return any(value and value in text for value in known) or bool(_LOOKS_SECRET.search(text))


_LOOKS_SECRET = re.compile(
    r"://[^/\s]*@|\b(?:AKIA|ASIA)[A-Z0-9]{16}|[A-Za-z0-9+/=]{40}|Signature=|Credential="
)
"""Matches a user name before a host, AWS's access and secret keys, and the header that signs a request."""


@functools.cache
def _creation_lock(process: int) -> threading.Lock:
    """Return the lock of one process.

    A forked process must not use its parent's lock: if another thread held it at the fork, it is never
    released.
    """
    return threading.Lock()


# Only the latest client is cached. A thread that still uses an older one has its own reference.
@functools.lru_cache(maxsize=1)
def _create(
    valid_for: tuple[object, ...], arguments: tuple[tuple[str, str], ...], timeout: float, checksums: bool
) -> Any:
    """Create a client.

    Args:
        valid_for: other values that the client depends on: the environment, the credentials file, and the
            process, because a forked process must not share its parent's connections.
        arguments: further arguments of boto3's client.
        timeout: in seconds.
        checksums: whether to send and compare checksums, unless the environment says otherwise.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        # A single attempt, because `retry` makes all further ones and limits their time.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=min(_CONNECT_TIMEOUT, timeout),
        read_timeout=timeout,
        max_pool_connections=_MAX_CONNECTIONS,
        tcp_keepalive=True,
        user_agent_extra="slam-asr",
        request_checksum_calculation=None if checksums else _WHEN_REQUIRED,
        response_checksum_validation=None if checksums else _WHEN_REQUIRED,
    )
    try:
        # A new session, because boto3's default session keeps the first credentials that it read.
        new = boto3.session.Session().client("s3", config=config, **dict(arguments))
        has_credentials = "@" in urlsplit(new.meta.endpoint_url).netloc
    except ValueError as error:
        if isinstance(error, BotoCoreError):  # InvalidRegionError is a ValueError too; `failures` explains it
            raise
        # boto3's message repeats the address, which may hold a password.
        raise ConfigurationError(
            "The address of the object storage is not valid: "
            "set AWS_ENDPOINT_URL to http://host:port or https://host."
        ) from None
    if has_credentials:
        raise ConfigurationError(
            "AWS_ENDPOINT_URL holds a name or password: "
            "take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return new


def _credentials_file() -> tuple[str, int]:
    """Return path and modification time (ns) of AWS's credentials file, which a client reads only once."""
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    try:
        return str(path), path.expanduser().stat().st_mtime_ns
    except (OSError, RuntimeError):
        return str(path), 0


def _mounted_secret() -> dict[str, str]:
    """Return the client's arguments from a mounted secret. Environment variables take precedence."""
    folder = Path(os.environ.get(SECRET) or SECRET_FOLDER)
    if not folder.is_dir():
        if os.environ.get(SECRET):
            raise ConfigurationError(
                f"{SECRET} names {folder}, which is not a folder: mount the secret there, or unset it."
            )
        return {}
    to_read: _FileNames = {
        argument: names
        for argument, names in _LOCATION.items()
        if not any(os.environ.get(n) for n in names if n.startswith("AWS_"))
    }
    # Access key, secret key and token belong together: never combine values from two sources.
    if not any(os.environ.get(n) for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")):
        to_read |= _CREDENTIALS
    arguments = _read_secret(folder, to_read)
    if len({"aws_access_key_id", "aws_secret_access_key"} & arguments.keys()) == 1:
        raise ConfigurationError(
            f"The secret at {folder} holds only one of access key and secret key: "
            "it needs the files accesskey and secretkey."
        )
    if "endpoint_url" in arguments and "://" not in arguments["endpoint_url"]:
        arguments["endpoint_url"] = f"http://{arguments['endpoint_url']}"
    return arguments


def _read_secret(folder: Path, to_read: _FileNames) -> dict[str, str]:
    """Read the files of one version of a secret, and try again if the secret changes in the meantime."""
    for _ in range(3):
        # Kubernetes changes all files of a secret at once, by pointing the link ..data to another folder.
        data = folder / "..data"
        version = data.resolve() if data.exists() else folder
        arguments: dict[str, str] = {}
        for argument, names in to_read.items():
            for name in names:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    content = (version / name).read_text(encoding="utf-8").strip()
                    if content:
                        arguments[argument] = content
                        break
        # Without a link ..data, Kubernetes does not manage the folder, and it has a single version.
        if version == folder or data.resolve() == version:
            break
    return arguments
