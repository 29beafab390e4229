"""Files on local disk, or in object storage at `s3://bucket/key` (AWS, MinIO, SeaweedFS, Ceph and others).

`paths` has the operations that programs use, and `local_copies` fetches objects; both work in the same way on
local paths and URIs. `local` writes local files atomically and computes SHA-256 digests. `cache` is a bounded
cache of fetched objects on local disk, and `locks` has the locks between processes.

Object storage is accessed through boto3: `address` parses URIs, `client` finds credentials and endpoint,
`retry` repeats requests, `failures` explains their errors, `objects` makes single requests, and `downloads`
and `uploads` transfer objects in parallel `pieces`.
"""

from slam_asr.storage.address import PathOrUri as PathOrUri
from slam_asr.storage.address import is_s3 as is_s3
from slam_asr.storage.local import allow_readers as allow_readers
from slam_asr.storage.local import digest as digest
from slam_asr.storage.local import local_path as local_path
from slam_asr.storage.local import sha256_of_bytes as sha256_of_bytes
from slam_asr.storage.local import sha256_of_file as sha256_of_file
from slam_asr.storage.local import write_atomically as write_atomically
from slam_asr.storage.local import write_json as write_json
from slam_asr.storage.local_copies import fetch as fetch
from slam_asr.storage.local_copies import fetch_folder as fetch_folder
from slam_asr.storage.objects import Info as Info
from slam_asr.storage.paths import delete as delete
from slam_asr.storage.paths import exists as exists
from slam_asr.storage.paths import info as info
from slam_asr.storage.paths import join as join
from slam_asr.storage.paths import name_of as name_of
from slam_asr.storage.paths import open_stream as open_stream
from slam_asr.storage.paths import parent_of as parent_of
from slam_asr.storage.paths import publish_folder as publish_folder
from slam_asr.storage.paths import read_bytes as read_bytes
from slam_asr.storage.paths import require_writable as require_writable
from slam_asr.storage.paths import resolve as resolve
from slam_asr.storage.paths import upload as upload
from slam_asr.storage.paths import walk as walk
from slam_asr.storage.paths import write_bytes as write_bytes
