"""What `s3://bucket/key` means."""

import os
import re

from slam_asr.errors import UserError

SCHEME = "s3://"
_LONGEST_KEY = 1024


def is_s3(path: str | os.PathLike) -> bool:
    """Whether a path lies in object storage."""
    return os.fspath(path).startswith(SCHEME)


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` → bucket and key.

    Raises:
        UserError: there is no bucket's name in it, or no object can have such a name.
    """
    place = uri.removeprefix(SCHEME).partition("/")[0]
    # A secret key may hold a slash, so that a colon alone says enough. What was given is not repeated.
    if "@" in place or ":" in place:
        raise UserError(
            "An s3:// address holds a name or password before its bucket: take it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    found = re.fullmatch(r"s3://([a-zA-Z0-9][a-zA-Z0-9._-]+)/?(.*)", uri, re.DOTALL)
    if not found:
        raise UserError(f"{uri} is no address in object storage: write it as s3://bucket/prefix.")
    try:
        long = len(found[2].encode()) > _LONGEST_KEY
    except UnicodeEncodeError:
        raise UserError(
            f"{ascii(uri)[1:-1]}: names in object storage are UTF-8, and this is not; rename it."
        ) from None
    if long:
        raise UserError(f"{uri} is too long: names of objects have at most {_LONGEST_KEY} bytes.")
    return found[1], found[2]


def folder_of(prefix: str) -> str:
    """The start that all keys below a prefix share: a folder's, and not that of another one with a longer name."""
    return prefix.rstrip("/") + "/" if prefix else ""
