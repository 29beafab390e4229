"""Objects behind `s3://bucket/key`, through boto3: AWS, MinIO, SeaweedFS, Ceph and others.

All of it under one name, for those who call it: `address` says what a URI means, `client` where credentials
and endpoint come from, `retry` what is tried again and what is said, `objects` are single requests,
`downloads` and `uploads` parallel ones.
"""

from slam_asr.storage.address import SCHEME, is_s3, split_uri
from slam_asr.storage.client import SECRET, SECRET_FOLDER, TIMEOUT
from slam_asr.storage.downloads import download
from slam_asr.storage.objects import (
    Object,
    ObjectStream,
    head,
    list_files,
    list_folders,
    list_objects,
    read,
    remove,
)
from slam_asr.storage.pieces import PART_BYTES
from slam_asr.storage.retry import DEFAULT_PATIENCE, PATIENCE, patience
from slam_asr.storage.uploads import AlreadyThere, upload, write

__all__ = [
    "DEFAULT_PATIENCE",
    "PART_BYTES",
    "PATIENCE",
    "SCHEME",
    "SECRET",
    "SECRET_FOLDER",
    "TIMEOUT",
    "AlreadyThere",
    "Object",
    "ObjectStream",
    "download",
    "head",
    "is_s3",
    "list_files",
    "list_folders",
    "list_objects",
    "patience",
    "read",
    "remove",
    "split_uri",
    "upload",
    "write",
]
