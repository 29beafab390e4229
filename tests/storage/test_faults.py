"""When a fifth of all requests fail, every call returns the right bytes; no flipped bit is overlooked."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import (
    delete,
    exists,
    fetch,
    fetch_folder,
    info,
    join,
    objects,
    open_stream,
    paths,
    pieces,
    publish_folder,
    read_bytes,
    upload,
    uploads,
    walk,
    write_bytes,
)
from slam_asr.storage.downloads import download
from tests.faults import BUSY, CUT, FLIP, LOST, RESET, STALL

ROOT = "s3://bucket/store"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BUSY, STALL, RESET, LOST, CUT])
def test_every_request_survives_every_kind_of_fault(faulty_s3, small_pieces, tmp_path, kind):
    seen = set()

    def fail_first_attempt(request):
        key = (request.method, request.target, request.headers.get("range"))
        if key in seen:
            return None
        seen.add(key)
        return kind

    faulty_s3.rule = fail_first_attempt
    content = noise(3 * small_pieces + 1)
    write_bytes(f"{ROOT}/a/large", content)
    write_bytes(f"{ROOT}/small", b"small")
    assert write_bytes(f"{ROOT}/once", b"first", replace=False)
    assert read_bytes(f"{ROOT}/small") == b"small"
    assert fetch(f"{ROOT}/a/large").read_bytes() == content
    assert [f.name for f in walk(ROOT)] == ["a/large", "once", "small"]
    assert paths.folders_in(ROOT) == ["a"]
    delete(f"{ROOT}/small")
    assert info(f"{ROOT}/small") is None
    assert faulty_s3.faults[kind] >= 10


@pytest.mark.slow
def test_content_of_every_size_survives_faults(faulty_s3, small_pieces, tmp_path):
    for size in (0, 1, small_pieces, small_pieces + 1, 9 * small_pieces + 7):
        content = noise(size, seed=size)
        (tmp_path / "file").write_bytes(content)
        uri = f"{ROOT}/{size}"
        upload(tmp_path / "file", uri)
        assert info(uri).bytes == size
        assert read_bytes(uri) == content
        assert fetch(uri).read_bytes() == content
        with open_stream(uri) as stream:
            assert stream.read(10) + stream.read() == content
        with open_stream(uri) as stream:
            assert b"".join(iter(lambda: stream.read(33_333), b"")) == content
        for start, end in ((0, size), (size // 3, size // 2), (max(size - 5, 0), size)):
            assert objects.read(uri, start, end) == content[start:end]
        write_bytes(uri, content[::-1])
        assert read_bytes(uri) == content[::-1]
    assert faulty_s3.faults.total() > 10


@pytest.mark.slow
def test_a_listing_of_several_pages_survives_faults(faulty_s3, bucket, monkeypatch):
    # On a busy machine, moto takes longer than the fixture's 0.3 s for a page of a thousand names.
    monkeypatch.setenv("SLAM_ASR_S3_TIMEOUT", "3")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "120")
    names = sorted(f"{i:04}" for i in range(2345))
    faulty_s3.fault_rate = 0
    from moto.s3.models import s3_backends

    backend = next(iter(s3_backends.values()))["global"]
    for name in names:
        backend.put_object("bucket", f"store/{name}", b"x")
    faulty_s3.fault_rate = 0.5
    assert [f.name for f in walk(ROOT)] == names
    assert faulty_s3.faults.total() > 0


@pytest.mark.slow
def test_folders_survive_faults(faulty_s3, small_pieces, tmp_path):
    files = {f"part-{i}/{i}.bin": noise(i * small_pieces // 3, seed=i) for i in range(20)}
    for name, content in files.items():
        write_bytes(tmp_path / "folder" / name, content)
    write_bytes(tmp_path / "folder" / "last.json", "{}")
    publish_folder(tmp_path / "folder", ROOT, last="last.json")
    fetched = fetch_folder(ROOT)
    assert {f.name: read_bytes(join(fetched, f.name)) for f in walk(fetched)} == files | {"last.json": b"{}"}
    assert faulty_s3.faults.total() > 5


def test_one_of_several_conditional_writers_wins_under_faults(faulty_s3):
    # moto may let two simultaneous conditional writers win, so it gets one request at a time.
    faulty_s3.one_at_a_time = True
    for attempt in range(3):
        with ThreadPoolExecutor(8) as pool:
            # All write the same content, so the content does not show which of them was first.
            writers = [
                pool.submit(write_bytes, f"{ROOT}/claim-{attempt}", b"mine", replace=False) for _ in range(8)
            ]
        assert sorted(writer.result() for writer in writers) == [False] * 7 + [True]
        assert read_bytes(f"{ROOT}/claim-{attempt}") == b"mine"


@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_without_conditional_writes_is_supported(faulty_s3, answer):
    faulty_s3.rule = lambda request: answer if "if-none-match" in request.headers else None
    assert write_bytes(f"{ROOT}/once", b"first", replace=False)
    assert not write_bytes(f"{ROOT}/once", b"second", replace=False)
    assert read_bytes(f"{ROOT}/once") == b"first"


def fail_first(count: int, kind, method: str):
    """Return a rule that makes the first `count` requests of a method fail."""
    remaining = [count]

    def rule(request):
        if request.method == method and remaining[0]:
            remaining[0] -= 1
            return kind
        return None

    return rule


@pytest.mark.parametrize("size", [1000, 350_000])
def test_a_bit_that_flips_in_a_download_is_corrected_or_reported(faulty_s3, small_pieces, size):
    faulty_s3.fault_rate = 0
    content = noise(size)
    write_bytes(f"{ROOT}/x", content)
    for reader in (lambda: read_bytes(f"{ROOT}/x"), lambda: fetch(f"{ROOT}/x").read_bytes()):
        faulty_s3.rule = fail_first(1, FLIP, "GET")
        assert reader() == content
    faulty_s3.rule = fail_first(1, FLIP, "GET")
    if size < small_pieces:
        assert open_stream(f"{ROOT}/x").read() == content
    else:
        # Bytes that were returned cannot be taken back, so the stream ends with an error.
        with pytest.raises(UserError, match="damaged"):
            open_stream(f"{ROOT}/x").read()
    assert faulty_s3.faults[FLIP] == 3


@pytest.mark.parametrize("size", [1000, 350_000])
@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "without checksums"])
def test_a_bit_that_flips_in_an_upload_is_corrected_by_a_retry(faulty_s3, small_pieces, size, checksums):
    faulty_s3.checks = checksums
    faulty_s3.rule = fail_first(2, FLIP, "PUT")
    content = noise(size)
    write_bytes(f"{ROOT}/x", content)
    assert faulty_s3.faults[FLIP] == 2
    faulty_s3.rule, faulty_s3.fault_rate = None, 0
    assert read_bytes(f"{ROOT}/x") == content


def test_a_network_that_flips_a_bit_every_time_is_reported(faulty_s3):
    faulty_s3.rule = lambda request: FLIP if request.method == "PUT" else None
    with pytest.raises(UserError, match=r"arrives damaged .* 3 times"):
        write_bytes(f"{ROOT}/x", b"content")
    assert faulty_s3.count("PUT") == 3 and not exists(f"{ROOT}/x")


@pytest.mark.parametrize("size", [1000, 350_000])
def test_a_damaged_object_is_reported_in_one_sentence(bucket, small_pieces, size, tmp_path):
    content = noise(size)
    write_bytes(f"{ROOT}/x", content)
    metadata = bucket.Object("store/x").metadata
    bucket.put_object(Key="store/x", Body=content[:-1] + bytes([content[-1] ^ 1]), Metadata=metadata)
    for reader in (read_bytes, fetch, lambda uri: open_stream(uri).read()):
        with pytest.raises(UserError, match="is damaged") as raised:
            reader(f"{ROOT}/x")
        assert "\n" not in raised.value.args[0]
    assert [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size] == []


def test_an_object_that_is_replaced_while_it_is_read_is_never_a_mixture(bucket, small_pieces, faulty_s3):
    old, new = noise(5 * small_pieces, seed=1), noise(5 * small_pieces, seed=2)
    write_bytes(f"{ROOT}/x", old)
    stream = objects.ObjectStream(f"{ROOT}/x")
    assert stream.read(10) == old[:10]
    bucket.put_object(Key="store/x", Body=new)
    with pytest.raises(UserError, match="was replaced while it was read"):
        stream.readall()
    # A fetch during which the object is replaced starts again.
    gets = []

    def replace(request):
        gets.append(request.method)
        if gets.count("GET") == 3:
            write_bytes_directly(bucket, old)
        return None

    faulty_s3.rule = replace
    assert fetch(f"{ROOT}/x").read_bytes() == old


def write_bytes_directly(bucket, content: bytes) -> None:
    from moto.s3.models import s3_backends

    next(iter(s3_backends.values()))["global"].put_object("bucket", "store/x", content)


def test_progress_of_a_download_that_starts_again_counts_each_byte_once(
    bucket, small_pieces, faulty_s3, tmp_path, monkeypatch
):
    # Pieces are fetched one after another, so two have arrived when the object is replaced.
    monkeypatch.setattr(pieces, "PARALLEL_PIECES", 1)
    old, new = noise(5 * small_pieces, seed=1), noise(5 * small_pieces, seed=2)
    write_bytes(f"{ROOT}/x", old)
    gets, counted = [], []

    def replace(request):
        gets.append(request.method)
        if gets.count("GET") == 3:
            write_bytes_directly(bucket, new)
        return None

    faulty_s3.rule = replace
    with open(tmp_path / "file", "w+b") as file:
        download(f"{ROOT}/x", file, report=counted.append)
    assert (tmp_path / "file").read_bytes() == new
    assert sum(counted) == len(new) and min(counted) == -2 * small_pieces


def test_progress_counts_each_byte_once(faulty_s3, small_pieces, tmp_path):
    content, counted = noise(7 * small_pieces + 3), []
    (tmp_path / "sent").write_bytes(content)
    uploads.upload(f"{ROOT}/x", tmp_path / "sent")
    with open(tmp_path / "fetched", "w+b") as file:
        download(f"{ROOT}/x", file, report=counted.append)
    assert sum(counted) == len(content)
    assert (tmp_path / "fetched").read_bytes() == content
