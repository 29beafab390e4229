"""Addresses in object storage: `s3://bucket/key`."""

import os
import re

from slam_asr.errors import StorageError

SCHEME = "s3://"
PathOrUri = str | os.PathLike[str]
"""A local path, or an address in object storage."""
_MAX_KEY_BYTES = 1024
"""S3's limit for the name of an object."""


def is_s3(path: PathOrUri) -> bool:
    """Return whether a path is an address in object storage.

    Raises:
        StorageError: the address names no bucket, such as `s3://$BUCKET` if the variable is not set. As a
            local path, it would be a folder named `s3:`.
    """
    text = os.fspath(path)
    if text != "s3:" and not text.startswith("s3:/"):
        return False
    if not re.match("s3://[^/]", text):
        raise StorageError(f"{_shown(text)} names no bucket: write it as s3://bucket/prefix.")
    return True


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/some/key` into bucket and key.

    Raises:
        StorageError: the address holds credentials, has no bucket, or has a key that no object can have.
    """
    authority = uri.removeprefix(SCHEME).partition("/")[0]
    # A colon is refused like an @, because a secret key may contain a slash: in `name:secret/key@bucket`, the
    # part before the first slash has no @. The message does not show the address, because it may contain a
    # password.
    if "@" in authority or ":" in authority:
        raise StorageError(
            "One of the s3:// addresses (not shown, as it may contain a password) begins with a name, "
            "password or server instead of a bucket (it contains : or @): write s3://bucket/prefix, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for credentials, and AWS_ENDPOINT_URL for the "
            "server."
        )
    match = re.fullmatch(r"s3://([a-zA-Z0-9][a-zA-Z0-9._-]+)/?(.*)", uri, re.DOTALL)
    if not match:
        raise StorageError(
            f"{_shown(uri)} is not an address in object storage: write it as s3://bucket/prefix."
        )
    bucket, key = match[1], match[2]
    try:
        too_long = len(key.encode()) > _MAX_KEY_BYTES
    except UnicodeEncodeError:
        raise StorageError(
            f"{_shown(uri)}: names in object storage must be UTF-8, and this one is not; rename it."
        ) from None
    if too_long:
        raise StorageError(
            f"{_shown(uri)} is too long: names of objects have at most {_MAX_KEY_BYTES} bytes."
        )
    return bucket, key


def _shown(uri: str) -> str:
    """Return an address as messages show it: on one line, in printable characters."""
    return uri if uri.isprintable() else ascii(uri)[1:-1]


def folder_prefix(prefix: str) -> str:
    """Return the prefix of all keys below a folder.

    It ends with a slash, so that the folder `a` does not include `a-b/x`. An empty prefix means the complete
    bucket, and remains empty.
    """
    return prefix.rstrip("/") + "/" if prefix else ""
