"""What will not pass is asked once and said in one sentence; what may is tried for a time that is said."""

import socket
import time
import traceback

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import (
    delete,
    fetch,
    fetch_folder,
    info,
    open_stream,
    read_bytes,
    s3,
    upload,
    walk,
    write_bytes,
)
from tests.faults import STALL

CALLS = {
    "info": info,
    "read": read_bytes,
    "stream": open_stream,
    "fetch": fetch,
    "folder": fetch_folder,
    "walk": lambda uri: list(walk(uri)),
    "write": lambda uri: write_bytes(uri, b"x"),
    "first": lambda uri: write_bytes(uri, b"x", replace=False),
    "delete": delete,
}


def sentence_of(call, uri: str) -> str:
    """What the user is told: one line."""
    with pytest.raises(UserError) as raised:
        call(uri)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    # What boto3 said may hold more than anybody should see: a traceback does not show it either.
    assert "botocore" not in "".join(traceback.format_exception(raised.value)).replace(
        "site-packages/botocore", ""
    )
    return str(raised.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((403, "AccessDenied"), "access is denied"),
        ((400, "ExpiredToken"), "token"),
        ((403, "InvalidAccessKeyId"), "access"),
        ((404, "NoSuchBucket"), "there is no such bucket"),
        ((507, "XMinioStorageFull"), "the server's disks are full"),
    ],
)
def test_what_will_not_pass_is_asked_once(faulty_s3, answer, said):
    faulty_s3.rule = lambda request: answer
    for name, call in CALLS.items():
        faulty_s3.clear()
        if answer[0] == 404 and name == "info":
            # HEAD has no body that tells a bucket that is not there from an object that is not.
            assert call("s3://bucket/x") is None
        else:
            expected = "no object" if answer[0] == 404 and name in ("stream", "fetch") else said
            assert expected in sentence_of(call, "s3://bucket/x"), name
        # Where an answer may mean another region, boto3 asks once for the bucket's.
        assert len([r for r in faulty_s3.requests if (r.method, r.target) != ("HEAD", "/bucket")]) == 1, name


@pytest.mark.parametrize("name", ["read", "stream", "fetch", "folder"])
def test_what_is_not_there_is_asked_for_once(faulty_s3, name):
    faulty_s3.share = 0
    assert "here is no" in sentence_of(CALLS[name], "s3://bucket/nothing") or "nothing at" in sentence_of(
        CALLS[name], "s3://bucket/nothing"
    )
    assert len(faulty_s3.requests) <= 2


def test_a_bucket_that_is_not_there_is_one_sentence(bucket):
    for name in ("read", "folder", "walk", "write", "first", "delete"):
        assert "there is no such bucket" in sentence_of(CALLS[name], "s3://no-such-bucket/x")


@pytest.mark.parametrize("name", ["info", "walk", "write"])
def test_an_endpoint_that_is_down_is_tried_for_a_time_that_is_said(bucket, name, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1.5")
    started = time.monotonic()
    said = sentence_of(CALLS[name], "s3://bucket/x")
    assert 1.4 < time.monotonic() - started < 5
    assert (
        "in 2 s of trying (no connection)" in said
        and "AWS_ENDPOINT_URL" in said
        and "SLAM_ASR_S3_PATIENCE" in said
    )


def test_silence_is_waited_for_as_long_as_is_said(faulty_s3, monkeypatch):
    faulty_s3.rule = lambda request: STALL
    monkeypatch.setenv("SLAM_ASR_S3_TIMEOUT", "0.2")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "0")
    started = time.monotonic()
    assert "no answer in time" in sentence_of(read_bytes, "s3://bucket/x")
    assert time.monotonic() - started < 3 and len(faulty_s3.requests) == 1


def test_a_long_time_of_trying_is_mentioned(faulty_s3, monkeypatch, capsys):
    from slam_asr.storage import retry

    write_bytes("s3://bucket/x", b"x")
    faulty_s3.rule = lambda request: (503, "SlowDown") if len(faulty_s3.requests) % 3 else None
    assert read_bytes("s3://bucket/x") == b"x"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(retry, "_QUIET", 0)
    assert read_bytes("s3://bucket/x") == b"x"
    assert "the server answers SlowDown; trying for another" in capsys.readouterr().out


@pytest.mark.parametrize("call", [read_bytes, fetch, lambda uri: write_bytes(uri, b"x")])
def test_an_address_that_cannot_be_is_one_sentence(bucket, call):
    for uri in ("k" * 1025, "ü" * 513, "a\udcff"):
        sentence_of(call, f"s3://bucket/{uri}")
    for uri in ("s3://Not_A.Bucket..name/x", "s3://b/x", "s3://", "s3:///x", "s3://bucket"):
        sentence_of(call, uri)


@pytest.mark.parametrize("variable", ["SLAM_ASR_S3_PATIENCE", "SLAM_ASR_S3_TIMEOUT"])
def test_a_time_that_is_no_number_is_one_sentence(bucket, monkeypatch, variable):
    for value in ("long", "-1", "nan"):
        monkeypatch.setenv(variable, value)
        assert variable in sentence_of(read_bytes, "s3://bucket/x")


def test_a_range_behind_the_end_is_one_sentence(faulty_s3):
    faulty_s3.share = 0
    write_bytes("s3://bucket/x", b"0123456789")
    assert s3.read("s3://bucket/x", 8) == b"89" and s3.read("s3://bucket/x", 3, 3) == b""
    faulty_s3.clear()
    for start, end in ((5, 11), (10, 12), (20, 30)):
        sentence_of(lambda uri, start=start, end=end: s3.read(uri, start, end), "s3://bucket/x")
    assert len(faulty_s3.requests) == 3


def test_a_server_that_cannot_be_trusted_is_said_at_once(s3_server, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.replace("http:", "https:"))
    started = time.monotonic()
    assert "no secure connection" in sentence_of(read_bytes, "s3://bucket/x")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("size", [10, 250_000])
def test_an_upload_that_fails_leaves_the_older_object(faulty_s3, small_pieces, tmp_path, size):
    (tmp_path / "file").write_bytes(b"n" * size)
    faulty_s3.share = 0
    write_bytes("s3://bucket/x", b"old")
    faulty_s3.rule = lambda request: "reset" if request.method == "PUT" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLAM_ASR_S3_PATIENCE", "1")
        assert "the connection was closed" in sentence_of(
            lambda uri: upload(tmp_path / "file", uri), "s3://bucket/x"
        )
    faulty_s3.rule = None
    assert read_bytes("s3://bucket/x") == b"old"
    from slam_asr.storage.client import client

    assert "Uploads" not in client().list_multipart_uploads(Bucket="bucket")
