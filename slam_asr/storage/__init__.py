"""Files on local disk, or in object storage at `s3://bucket/key` (AWS, MinIO, SeaweedFS, Ceph and others).

`paths` has the operations that programs use, and `local_copies` fetches objects; both work in the same way on
local paths and URIs. `local` writes local files atomically and computes SHA-256 digests. `cache` is a bounded
cache of fetched objects on local disk, and `locks` has the locks between processes.

Object storage is accessed through boto3: `address` parses URIs, `client` finds credentials and endpoint,
`retry` repeats requests, `failures` explains their errors, `objects` makes single requests, and `downloads`
and `uploads` transfer objects in parallel `pieces`.
"""

from slam_asr.storage.address import PathOrUri, is_s3
from slam_asr.storage.local import (
    allow_readers,
    digest,
    local_path,
    sha256_of_bytes,
    sha256_of_file,
    write_atomically,
    write_json,
)
from slam_asr.storage.local_copies import fetch, fetch_folder
from slam_asr.storage.objects import Info
from slam_asr.storage.paths import (
    delete,
    exists,
    info,
    join,
    name_of,
    open_stream,
    parent_of,
    publish_folder,
    read_bytes,
    require_writable,
    resolve,
    upload,
    walk,
    write_bytes,
)

__all__ = [
    "Info",
    "PathOrUri",
    "allow_readers",
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
    "require_writable",
    "resolve",
    "sha256_of_bytes",
    "sha256_of_file",
    "upload",
    "walk",
    "write_atomically",
    "write_bytes",
    "write_json",
]
