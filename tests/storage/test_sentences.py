"""Permanent failures are reported in one sentence without retries; temporary ones are retried for a while."""

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
    objects,
    open_stream,
    read_bytes,
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


def message_of(call, uri: str) -> str:
    """Return the message of the error that a call raises, after checking that it is a single sentence."""
    with pytest.raises(UserError) as raised:
        call(uri)
    assert "\n" not in raised.value.args[0] and str(raised.value).endswith(".")
    # boto3's own error may contain credentials, so even a traceback must not show it.
    assert "botocore" not in "".join(traceback.format_exception(raised.value)).replace(
        "site-packages/botocore", ""
    )
    return str(raised.value)


BEGIN_WITH_HEAD = ("info", "stream", "fetch")
"""The calls that begin with a HEAD request. Its answer has no body, and thus no precise reason."""


@pytest.mark.parametrize(
    ("answer", "reason", "reason_without_body"),
    [
        ((403, "AccessDenied"), "access is denied", "access is denied"),
        ((400, "ExpiredToken"), "the session's token has expired", "as it does for an expired token"),
        ((403, "InvalidAccessKeyId"), "the access key is unknown", "access is denied"),
        ((404, "NoSuchBucket"), "there is no such bucket", "no object"),
        ((507, "XMinioStorageFull"), "the server's disks are full", "the server's disks are full"),
    ],
)
def test_a_permanent_failure_is_not_retried(faulty_s3, answer, reason, reason_without_body):
    faulty_s3.rule = lambda request: answer
    for name, call in CALLS.items():
        faulty_s3.clear()
        if answer[0] == 404 and name == "info":
            assert call("s3://bucket/x") is None
        else:
            expected = reason_without_body if name in BEGIN_WITH_HEAD else reason
            assert expected in message_of(call, "s3://bucket/x"), name
        # If the answer could mean another region, boto3 itself requests the bucket's region once.
        assert len([r for r in faulty_s3.requests if (r.method, r.target) != ("HEAD", "/bucket")]) == 1, name


@pytest.mark.parametrize("name", ["read", "stream", "fetch", "folder"])
def test_the_request_for_a_missing_object_is_not_repeated(faulty_s3, name):
    faulty_s3.fault_rate = 0
    message = message_of(CALLS[name], "s3://bucket/nothing").lower()
    assert "there is no" in message or "nothing at" in message
    assert len(faulty_s3.requests) <= 2


def test_a_missing_bucket_is_reported_in_one_sentence(bucket):
    for name in ("read", "folder", "walk", "write", "first", "delete"):
        assert "there is no such bucket" in message_of(CALLS[name], "s3://no-such-bucket/x")


@pytest.mark.parametrize("name", ["info", "walk", "write"])
def test_an_unreachable_endpoint_is_retried_until_the_time_limit(bucket, name, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1.5")
    started = time.monotonic()
    message = message_of(CALLS[name], "s3://bucket/x")
    assert 1.4 < time.monotonic() - started < 5
    assert (
        "within 2 s of trying (no connection)" in message
        and "AWS_ENDPOINT_URL" in message
        and "SLAM_ASR_S3_PATIENCE" in message
    )


def test_a_silent_server_is_given_up_after_the_time_limit(faulty_s3, monkeypatch):
    faulty_s3.rule = lambda request: STALL
    monkeypatch.setenv("SLAM_ASR_S3_TIMEOUT", "0.2")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "0")
    started = time.monotonic()
    assert "no answer in time" in message_of(read_bytes, "s3://bucket/x")
    assert time.monotonic() - started < 3 and len(faulty_s3.requests) == 1


def test_long_retries_are_logged(faulty_s3, monkeypatch, capsys):
    from slam_asr.storage import retry

    write_bytes("s3://bucket/x", b"x")
    faulty_s3.rule = lambda request: (503, "SlowDown") if len(faulty_s3.requests) % 3 else None
    assert read_bytes("s3://bucket/x") == b"x"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(retry, "_SILENT_SECONDS", 0)
    assert read_bytes("s3://bucket/x") == b"x"
    assert "the server answers SlowDown; trying for another" in capsys.readouterr().out


@pytest.mark.parametrize("call", [read_bytes, fetch, lambda uri: write_bytes(uri, b"x")])
def test_an_invalid_address_is_reported_in_one_sentence(bucket, call):
    for uri in ("k" * 1025, "ü" * 513, "a\udcff"):
        message_of(call, f"s3://bucket/{uri}")
    for uri in ("s3://Not_A.Bucket..name/x", "s3://b/x", "s3://", "s3:///x", "s3://bucket"):
        message_of(call, uri)


@pytest.mark.parametrize("variable", ["SLAM_ASR_S3_PATIENCE", "SLAM_ASR_S3_TIMEOUT"])
def test_an_invalid_time_limit_is_reported_in_one_sentence(bucket, monkeypatch, variable):
    for value in ("long", "-1", "nan"):
        monkeypatch.setenv(variable, value)
        assert variable in message_of(read_bytes, "s3://bucket/x")


def test_a_range_beyond_the_end_is_reported_in_one_sentence(faulty_s3):
    faulty_s3.fault_rate = 0
    write_bytes("s3://bucket/x", b"0123456789")
    assert objects.read("s3://bucket/x", 8) == b"89" and objects.read("s3://bucket/x", 3, 3) == b""
    faulty_s3.clear()
    for start, end in ((5, 11), (10, 12), (20, 30)):
        message_of(lambda uri, start=start, end=end: objects.read(uri, start, end), "s3://bucket/x")
    assert len(faulty_s3.requests) == 3


@pytest.mark.parametrize("ca_bundle", [None, "missing.pem"])
def test_an_impossible_tls_connection_is_reported_at_once(
    s3_server, bucket, monkeypatch, tmp_path, ca_bundle
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.replace("http:", "https:"))
    if ca_bundle:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / ca_bundle))
    started = time.monotonic()
    assert "no secure connection" in message_of(read_bytes, "s3://bucket/x")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("kind", ["fetch", "upload"])
def test_a_permanent_failure_of_one_piece_ends_the_retries_of_the_others(
    faulty_s3, small_pieces, tmp_path, kind
):
    faulty_s3.fault_rate = 0
    (tmp_path / "file").write_bytes(b"n" * 350_000)
    upload(tmp_path / "file", "s3://bucket/x")

    def rule(request):
        piece = request.target + request.headers.get("range", "")
        if "partNumber=1" in piece or "bytes=0-" in piece:
            return 503, "SlowDown"
        return (403, "AccessDenied") if "partNumber=3" in piece or "bytes=200000-" in piece else None

    faulty_s3.rule = rule
    calls = {"fetch": fetch, "upload": lambda uri: upload(tmp_path / "file", uri)}
    started = time.monotonic()
    assert "access is denied" in message_of(calls[kind], "s3://bucket/x")
    assert time.monotonic() - started < 10  # otherwise, the first piece would be retried for 30 s


@pytest.mark.parametrize("size", [10, 250_000])
def test_a_failed_upload_leaves_the_previous_object(faulty_s3, small_pieces, tmp_path, size):
    (tmp_path / "file").write_bytes(b"n" * size)
    faulty_s3.fault_rate = 0
    write_bytes("s3://bucket/x", b"old")
    faulty_s3.rule = lambda request: "reset" if request.method == "PUT" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLAM_ASR_S3_PATIENCE", "1")
        assert "the connection was closed" in message_of(
            lambda uri: upload(tmp_path / "file", uri), "s3://bucket/x"
        )
    faulty_s3.rule = None
    assert read_bytes("s3://bucket/x") == b"old"
    from slam_asr.storage.client import client

    assert "Uploads" not in client().list_multipart_uploads(Bucket="bucket")
