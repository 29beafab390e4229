"""An object is fetched once, by one process; what a killed process leaves does no harm.

A full disk is reported in one sentence.
"""

import multiprocessing
import os
import random
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slam_asr.errors import from_os_error
from slam_asr.storage import exists, fetch, fetch_folder, name_of, read_bytes, upload, write_bytes
from slam_asr.storage.client import client
from tests import ranks
from tests.faults import STALL

fork = multiprocessing.get_context("fork")
NOISE = random.Random(0).randbytes(350_000)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_concurrent_workers_fetch_each_object_once(faulty_s3, small_pieces, tmp_path, kind):
    faulty_s3.fault_rate = 0
    for name in ("a", "b/c"):
        write_bytes(f"s3://bucket/folder/{name}", name.encode() * 1000)
    write_bytes("s3://bucket/file", NOISE)
    faulty_s3.clear()

    def fetch_all() -> None:
        assert fetch("s3://bucket/file").read_bytes() == NOISE
        folder = fetch_folder("s3://bucket/folder")
        assert (folder / "b/c").read_bytes() == b"b/c" * 1000

    if kind == "processes":
        assert ranks.fork(*[fetch_all] * 4) == [0] * 4
    else:
        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(fetch_all) for _ in range(4)]
        assert [worker.result() for worker in workers] == [None] * 4
    assert faulty_s3.count("GET", "/file") == 4 and faulty_s3.count("GET", "/folder/") == 2
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_an_object_is_fetched_again_after_a_killed_fetch(faulty_s3, small_pieces, tmp_path):
    faulty_s3.fault_rate = 0
    write_bytes("s3://bucket/folder/a", NOISE)
    faulty_s3.rule = lambda request: STALL if "bytes=200000" in request.headers.get("range", "") else None
    for fetch_one in (lambda: fetch("s3://bucket/folder/a"), lambda: fetch_folder("s3://bucket/folder")):
        process = fork.Process(target=fetch_one)
        process.start()
        while not [f for f in (tmp_path / "cache").rglob("*.partial") if not f.is_file() or f.stat().st_size]:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    faulty_s3.rule = None
    assert fetch("s3://bucket/folder/a").read_bytes() == NOISE
    assert (fetch_folder("s3://bucket/folder") / "a").read_bytes() == NOISE
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_full_disk_is_reported_in_one_sentence_and_leaves_no_files(bucket, small_pieces, tmp_path, name):
    write_bytes("s3://bucket/folder/file", NOISE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(OSError) as raised:
            fetch_folder("s3://bucket/folder") if name == "folder" else fetch("s3://bucket/folder/file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(from_os_error(raised.value))
    assert message.startswith("The disk is full") and "file" in message
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"]


def test_an_object_with_a_long_name_is_cached_under_a_shorter_one(bucket):
    uri = "s3://bucket/" + "ü" * 300 + ".flac"
    write_bytes(uri, b"x")
    assert fetch(uri).read_bytes() == b"x" and name_of(fetch(uri)).endswith("ü.flac")


def test_a_killed_upload_leaves_the_previous_object(faulty_s3, small_pieces, tmp_path):
    faulty_s3.fault_rate = 0
    (tmp_path / "file").write_bytes(NOISE)
    for has_previous in (False, True):
        if has_previous:
            write_bytes("s3://bucket/x", b"old")
        faulty_s3.clear()
        faulty_s3.rule = lambda request: STALL if "partNumber=3" in request.target else None
        process = fork.Process(target=upload, args=(tmp_path / "file", "s3://bucket/x"))
        process.start()
        while not faulty_s3.faults[STALL]:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        faulty_s3.rule = None
        assert exists("s3://bucket/x") == has_previous
    assert read_bytes("s3://bucket/x") == b"old"
    upload(tmp_path / "file", "s3://bucket/x")
    assert read_bytes("s3://bucket/x") == NOISE
    for unfinished in client().list_multipart_uploads(Bucket="bucket").get("Uploads", []):
        client().abort_multipart_upload(Bucket="bucket", Key="x", UploadId=unfinished["UploadId"])
