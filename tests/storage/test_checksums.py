"""Uploads work with servers that refuse checksums. The uploaded object is then verified in another way."""

import pytest

from slam_asr.errors import StorageError, UserError
from slam_asr.storage import fetch, objects, read_bytes, upload, write_bytes
from slam_asr.storage.client import client
from tests.faults import FLIP

ROOT = "s3://bucket/store"


def sent_checksums(proxy) -> int:
    """Count the requests with a checksum in a header."""
    return sum(
        any(n.startswith(("x-amz-checksum-", "x-amz-sdk-")) for n in r.headers) for r in proxy.requests
    )


def refuse_checksums(status: int, code: str):
    """Return a rule that refuses headers with checksums, as Backblaze B2 did (boto/s3transfer#327)."""
    names = ("x-amz-checksum-", "x-amz-sdk-checksum-algorithm", "x-amz-trailer")
    return lambda request: (
        (status, code)
        if request.method in ("PUT", "POST") and any(n.startswith(names) for n in request.headers)
        else None
    )


@pytest.mark.real_input("B09-s3-without-checksums")
@pytest.mark.parametrize(
    "answer", [(400, "InvalidArgument"), (501, "NotImplemented"), (400, "InvalidRequest")]
)
def test_a_server_that_refuses_checksums_works(faulty_s3, small_pieces, tmp_path, capsys, answer):
    faulty_s3.rule = refuse_checksums(*answer)
    content = bytes(range(250)) * 1400
    (tmp_path / "file").write_bytes(content)
    write_bytes(f"{ROOT}/small", b"small")
    upload(tmp_path / "file", f"{ROOT}/large")
    assert write_bytes(f"{ROOT}/once", b"first", replace=False)
    assert not write_bytes(f"{ROOT}/once", b"second", replace=False)
    assert [read_bytes(f"{ROOT}/{name}") for name in ("small", "large", "once")] == [
        b"small",
        content,
        b"first",
    ]
    # Only the first request had a checksum, and it was refused.
    assert faulty_s3.faults.total() == sent_checksums(faulty_s3) == 1
    printed = capsys.readouterr().out
    assert f'refuses checksums: {answer[1]} ("{answer[1]}, from the proxy")' in printed
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("kind", ["small", "large", "once"])
def test_the_first_request_of_any_kind_may_be_refused(faulty_s3, small_pieces, tmp_path, kind):
    faulty_s3.rule = refuse_checksums(400, "InvalidArgument")
    content = b"c" * (250_000 if kind == "large" else 3)
    (tmp_path / "file").write_bytes(content)
    if kind == "once":
        assert write_bytes(f"{ROOT}/x", content, replace=False)
    else:
        upload(tmp_path / "file", f"{ROOT}/x")
    assert fetch(f"{ROOT}/x").read_bytes() == content


@pytest.mark.real_input("B09-s3-without-checksums")
def test_the_variable_of_boto3_that_switches_checksums_off_is_honoured(
    faulty_s3, small_pieces, tmp_path, monkeypatch
):
    faulty_s3.fault_rate = 0
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    (tmp_path / "file").write_bytes(b"c" * 250_000)
    upload(tmp_path / "file", f"{ROOT}/large")
    write_bytes(f"{ROOT}/small", b"small")
    assert write_bytes(f"{ROOT}/once", b"first", replace=False)
    assert sent_checksums(faulty_s3) == 0 and len(faulty_s3.requests) > 5
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "sometimes")
    with pytest.raises(UserError, match="must be when_supported or when_required"):
        write_bytes(f"{ROOT}/small", b"small")


def test_a_flipped_bit_is_noticed_without_checksums(faulty_s3, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    flips = [FLIP]
    faulty_s3.rule = lambda request: flips.pop() if request.method == "PUT" and flips else None
    write_bytes(f"{ROOT}/x", b"content")
    assert faulty_s3.faults[FLIP] == 1 and read_bytes(f"{ROOT}/x") == b"content"


def test_without_checksum_and_md5_the_object_is_read_back(faulty_s3, tmp_path, monkeypatch):
    """An etag is not an MD5 sum if the bucket encrypts with keys of a key management service."""
    faulty_s3.checks, faulty_s3.fault_rate = False, 0
    # moto's etag is still an MD5 sum, but the code may not rely on it.
    client().put_bucket_encryption(
        Bucket="bucket",
        ServerSideEncryptionConfiguration={
            "Rules": [
                {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "k"}}
            ]
        },
    )
    monkeypatch.setattr(objects, "_STREAM_BYTES", 2**20)
    (tmp_path / "file").write_bytes(bytes(5 * 2**19))
    upload(tmp_path / "file", f"{ROOT}/x")
    assert faulty_s3.count("GET", "/store/x") == 3
    faulty_s3.rule = lambda request: FLIP if request.method == "PUT" else None
    with pytest.raises(StorageError, match=r"store/x is damaged"):
        upload(tmp_path / "file", f"{ROOT}/x")


def test_the_servers_own_words_are_in_the_message(faulty_s3):
    faulty_s3.rule = lambda request: (400, "InvalidStorageClass")
    with pytest.raises(
        StorageError, match=r'InvalidStorageClass \("InvalidStorageClass, from the proxy"\); check'
    ):
        write_bytes(f"{ROOT}/x", b"x")


def test_words_with_a_credential_are_not_shown(faulty_s3, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "short")
    for words in (
        "the key short is wrong",
        "see http://name:password@host/x",
        "AKIAIOSFODNN7EXAMPLE is unknown",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY1 was sent",
        "Authorization: Credential=a/b, Signature=0",
    ):
        faulty_s3.rule = lambda request, words=words: (400, words)
        with pytest.raises(StorageError, match="an error without a code; check") as raised:
            write_bytes(f"{ROOT}/x", b"x")
        assert words not in str(raised.value) + capsys.readouterr().out
    harmless = "Unsupported header 'x-amz-sdk-checksum-algorithm' received for this API call."
    faulty_s3.rule = lambda request: (400, harmless)
    with pytest.raises(StorageError, match=harmless):
        write_bytes(f"{ROOT}/x", b"x")
