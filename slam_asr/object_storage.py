"""Objects behind `s3://bucket/key`, through boto3: AWS, MinIO, SeaweedFS, Ceph and others.

Endpoint and credentials come from where boto3 looks for them: `AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID` and so on, or its configuration files, or the machine's role.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slam_asr.errors import UserError

SCHEME = "s3://"


@dataclass(frozen=True)
class Object:
    """An object in a bucket."""

    key: str
    bytes: int
    etag: str
    """Changes with the content."""


def is_s3(path: str | os.PathLike) -> bool:
    """Whether a path lies in object storage."""
    return os.fspath(path).startswith(SCHEME)


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` → bucket and key.

    Raises:
        UserError: there is no bucket's name in it.
    """
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]+)/?(.*)", uri)
    if not found:
        raise UserError(f"{uri} is no address in object storage: write it as s3://bucket/prefix.")
    return found[1], found[2]


def list_objects(uri: str) -> list[Object]:
    """The object of this address, or all below it as below a folder, by key; empty where there is none.

    Raises:
        UserError: the bucket is not there, not permitted, or not to be reached.
    """
    bucket, prefix = split_uri(uri)
    with _failures_of(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [Object(o["Key"], o["Size"], o["ETag"].strip('"')) for page in pages for o in page.get("Contents", [])]
    folder = prefix.rstrip("/") + "/" if prefix else ""
    return sorted((o for o in found if o.key == prefix or o.key.startswith(folder)), key=lambda o: o.key)


def download(uri: str, objects: list[Object], folder: Path, report: Callable[[int], None] | None = None) -> None:
    """Fetch objects from below `uri` into a folder, under their names below it.

    Each is written aside and renamed when it is whole; one that is there already with its size is kept.

    Args:
        uri: as given to `list_objects`.
        objects: some of what that gave.
        folder: for the files.
        report: called with the number of bytes of each piece that arrives, by several threads.

    Raises:
        UserError: an object is gone, not permitted, or does not arrive whole.
    """
    bucket, prefix = split_uri(uri)
    client = _client()
    for item in objects:
        name = item.key.removeprefix(prefix).lstrip("/") or item.key.rpartition("/")[2]
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{uri} holds an object whose name leads out of its folder, {name}: it is not fetched.")
        if target.is_file() and target.stat().st_size == item.bytes:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.partial")
        with _failures_of(f"{SCHEME}{bucket}/{item.key}"):
            # boto3 fetches in parallel pieces, repeats what fails, and compares checksums where the object has them.
            client.download_file(bucket, item.key, str(aside), Callback=report)
        if aside.stat().st_size != item.bytes:
            raise UserError(f"{SCHEME}{bucket}/{item.key} changed while it was read: run the same command again.")
        aside.rename(target)


def _client() -> Any:
    import boto3
    from botocore.config import Config

    with _failures_of("object storage"):
        # A session of its own: the default one keeps the credentials that it saw first.
        config = Config(retries={"mode": "adaptive", "max_attempts": 5}, connect_timeout=5, read_timeout=60)
        return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def _failures_of(uri: str) -> Iterator[None]:
    """Turn boto3's many errors into a sentence each."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
    )

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(f"{uri} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile.") from error
    except NoRegionError as error:
        raise UserError(f"{uri} needs a region: set AWS_REGION.") from error
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        why = {
            "NoSuchBucket": "there is no such bucket", "NoSuchKey": "there is no such object", "404": "there is no such object",
            "AccessDenied": "access is denied", "403": "access is denied", "InvalidAccessKeyId": "the access key is unknown",
            "SignatureDoesNotMatch": "the secret key is wrong",
        }.get(code, f"the server answers {code or error}")
        raise UserError(f"{uri} cannot be read: {why}; check the address, the credentials and AWS_ENDPOINT_URL.") from error
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(
            f"{uri} cannot be reached ({type(error).__name__}): check the network and AWS_ENDPOINT_URL."
        ) from error
