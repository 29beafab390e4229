"""Files, whether on this machine's disk or behind `s3://bucket/key`.

`paths` has what programs use and works on both; `local` is visible-whole-or-not-at-all on disk and the
digests that name things; `s3` is object storage through boto3; `cache` keeps fetched objects on disk,
within a bound.
"""

from slam_asr.storage.local import (
    digest,
    local_path,
    sha256_of_bytes,
    sha256_of_file,
    write_atomically,
    write_json,
)
from slam_asr.storage.paths import (
    Info,
    delete,
    exists,
    fetch,
    fetch_folder,
    info,
    is_s3,
    join,
    name_of,
    open_stream,
    parent_of,
    publish_folder,
    read_bytes,
    resolve,
    upload,
    walk,
    write_bytes,
)

__all__ = [
    "Info",
    "delete",
    "digest",
    "exists",
    "fetch",
    "fetch_folder",
    "info",
    "is_s3",
    "join",
    "local_path",
    "name_of",
    "open_stream",
    "parent_of",
    "publish_folder",
    "read_bytes",
    "resolve",
    "sha256_of_bytes",
    "sha256_of_file",
    "upload",
    "walk",
    "write_atomically",
    "write_bytes",
    "write_json",
]
