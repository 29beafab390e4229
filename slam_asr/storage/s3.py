"""Objects at `s3://bucket/key`, through boto3: AWS, MinIO, SeaweedFS, Ceph and others.

This module collects the public names of the modules that implement it. `address` parses URIs, `client` finds
credentials and endpoint, `retry` decides what is retried and words the errors, `objects` makes single
requests, and `downloads` and `uploads` make parallel ones.
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
from slam_asr.storage.retry import DEFAULT_PATIENCE, PATIENCE, CredentialsMissing, patience
from slam_asr.storage.uploads import ObjectExists, upload, write

__all__ = [
    "DEFAULT_PATIENCE",
    "PART_BYTES",
    "PATIENCE",
    "SCHEME",
    "SECRET",
    "SECRET_FOLDER",
    "TIMEOUT",
    "CredentialsMissing",
    "Object",
    "ObjectExists",
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
