"""boto3's client: where credentials, region and endpoint come from, and how long a request may take.

Endpoint, region and credentials come from where AWS tools look for them (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID` and so on, configuration files, the machine's or the pod's role), or from a
Kubernetes secret that is mounted as a folder; see `SECRET`. They are looked up for each call, so that
a secret that is changed under a running program is used.
"""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slam_asr.errors import UserError

SECRET = "SLAM_ASR_S3_SECRET"
"""Environment variable that names the folder of a mounted secret, if it is not at `SECRET_FOLDER`."""
SECRET_FOLDER = "/var/run/secrets/slam-asr/s3"
_CREDENTIALS = {
    "aws_access_key_id": ("AWS_ACCESS_KEY_ID", "accesskey"),
    "aws_secret_access_key": ("AWS_SECRET_ACCESS_KEY", "secretkey"),
    "aws_session_token": ("AWS_SESSION_TOKEN",),
}
"""Files in it: AWS's own names, or those of the secret that Kubeflow Pipelines makes (`accesskey`, `secretkey`)."""
_PLACES = {
    "region_name": ("AWS_REGION", "AWS_DEFAULT_REGION", "region"),
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "endpoint"),
}

TIMEOUT = "SLAM_ASR_S3_TIMEOUT"
"""Environment variable: for how many seconds a silent server is waited for before a request counts as failed."""
DEFAULT_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 5.0
_MOST_CONNECTIONS = 64

_clients: dict[tuple, Any] = {}
_making = threading.Lock()


def _start_anew() -> None:
    """Connections are not shared with a forked process, nor is a lock that another thread held."""
    global _making
    _making = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_start_anew)


def seconds_from(variable: str, default: float) -> float:
    """A number of seconds that an environment variable may set.

    Raises:
        UserError: it is no such number.
    """
    said = os.environ.get(variable, "")
    try:
        number = float(said) if said else default
    except ValueError:
        number = float("nan")
    if not number >= 0:
        raise UserError(f"{variable} is {said!r}: give a number of seconds.")
    return number


def client() -> Any:
    """The client for the credentials of the moment; threads share it.

    Raises:
        UserError: the secret, or the endpoint's address, is not as it must be.
    """
    arguments = _mounted_secret() | _region()
    timeout = max(seconds_from(TIMEOUT, DEFAULT_TIMEOUT), 0.001)
    ambient = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "HOME"))
    wanted = (ambient, _credentials_file(), timeout, tuple(sorted(arguments.items())))
    with _making:
        if wanted not in _clients:
            made = _make(arguments, timeout)
            # One is enough: a thread that is still at work with an older one keeps it until it has finished.
            _clients.clear()
            _clients[wanted] = made
        return _clients[wanted]


def _make(arguments: dict[str, str], timeout: float) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        # One try: `retry.patiently` has the others, so that they are counted and timed in one place.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=min(_CONNECT_TIMEOUT, timeout),
        read_timeout=timeout,
        max_pool_connections=_MOST_CONNECTIONS,
        tcp_keepalive=True,
        user_agent_extra="slam-asr",
    )
    try:
        # A session of its own: the default one keeps the credentials that it saw first.
        made = boto3.session.Session().client("s3", config=config, **arguments)
        holds_name = "@" in urlsplit(made.meta.endpoint_url).netloc
    except ValueError as error:
        if isinstance(error, BotoCoreError):
            raise
        # boto3's own text repeats the address, which may hold a password.
        raise UserError(
            "The address of the object storage is not valid: set AWS_ENDPOINT_URL to http://host:port or https://host."
        ) from None
    if holds_name:
        raise UserError(
            "AWS_ENDPOINT_URL holds a name or password: take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return made


def _region() -> dict[str, str]:
    # boto3 knows only the second of the two names.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return {"region_name": region} if region else {}


def _credentials_file() -> tuple[str, int]:
    """Name and time of AWS's file of credentials: boto3 reads it only once."""
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    try:
        return str(path), path.expanduser().stat().st_mtime_ns
    except (OSError, RuntimeError):
        return str(path), 0


def _mounted_secret() -> dict[str, str]:
    """Arguments for the client from a mounted secret; what the environment says comes first."""
    folder = Path(os.environ.get(SECRET) or SECRET_FOLDER)
    if not folder.is_dir():
        if os.environ.get(SECRET):
            raise UserError(
                f"{SECRET} names {folder}, which is no folder: mount the secret there, or unset it."
            )
        return {}
    wanted = {
        a: names
        for a, names in _PLACES.items()
        if not any(os.environ.get(n) for n in names if n.startswith("AWS_"))
    }
    # Name, password and token belong together: those of two places are never mixed.
    if not any(os.environ.get(n) for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")):
        wanted |= _CREDENTIALS
    found = _read_secret(folder, wanted)
    if len({"aws_access_key_id", "aws_secret_access_key"} & found.keys()) == 1:
        raise UserError(
            f"The secret at {folder} holds only one of access key and secret key: it needs the files accesskey and secretkey."
        )
    if "endpoint_url" in found and "://" not in found["endpoint_url"]:
        found["endpoint_url"] = f"http://{found['endpoint_url']}"
    return found


def _read_secret(folder: Path, wanted: dict[str, tuple[str, ...]]) -> dict[str, str]:
    for _ in range(3):
        # Kubernetes changes all files of a secret at once, by pointing ..data at another folder.
        data = folder / "..data"
        version = data.resolve() if data.exists() else folder
        found: dict[str, str] = {}
        for argument, names in wanted.items():
            for name in names:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    content = (version / name).read_text().strip()
                    if content:
                        found[argument] = content
                        break
        if version == folder or data.resolve() == version:
            break
    return found
