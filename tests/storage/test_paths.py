"""The same calls have the same results on a local folder and on a prefix in object storage."""

import os

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import (
    delete,
    exists,
    fetch,
    fetch_folder,
    info,
    join,
    open_stream,
    paths,
    publish_folder,
    read_bytes,
    resolve,
    upload,
    walk,
    write_bytes,
)

NAMES = ["a-b/x", "a.txt", "a/b/c", "a/é ü", "a0", "z"]
"""Sorted by their bytes: '-' and '.' come before '/', and '0' comes after it."""


@pytest.fixture(params=["folder", "prefix"])
def root(request, tmp_path):
    if request.param == "prefix":
        request.getfixturevalue("bucket")
        return "s3://bucket/some/prefix"
    return str(tmp_path / "root")


def test_written_files_are_listed_in_order_and_can_be_read(root):
    for name in reversed(NAMES):
        assert write_bytes(join(root, name), name.encode())
    assert [f.name for f in walk(root)] == NAMES
    assert all(f.bytes == len(f.name.encode()) for f in walk(root))
    for name in NAMES:
        assert read_bytes(join(root, name)) == name.encode()
        assert fetch(join(root, name)).read_bytes() == name.encode()
        assert open_stream(join(root, name)).read() == name.encode()
    assert sorted(f.name for f in walk(fetch_folder(root))) == sorted(NAMES)


def test_a_folders_own_files_and_folders_are_listed_without_deeper_ones(root):
    for name in NAMES:
        write_bytes(join(root, name), b"x")
    assert paths.names_in(root) == ["a.txt", "a0", "z"] and paths.folders_in(root) == ["a", "a-b"]
    assert paths.names_in(join(root, "nothing")) == [] == paths.folders_in(join(root, "nothing"))


def test_a_prefix_is_a_folder_not_the_beginning_of_a_name(root):
    write_bytes(join(root, "store"), b"a file")
    write_bytes(join(root, "store-2/x"), b"x")
    assert [f.name for f in walk(join(root, "stor"))] == []
    assert [f.name for f in walk(join(root, "store-2"))] == ["x"]


def test_a_missing_file_has_no_metadata_and_can_be_deleted(root):
    assert info(join(root, "nothing")) is None and not exists(join(root, "nothing"))
    assert list(walk(join(root, "nothing"))) == []
    delete(join(root, "nothing"))


def test_without_replace_the_first_writer_wins(root):
    path = join(root, "once")
    assert write_bytes(path, b"first", replace=False)
    assert not write_bytes(path, b"second", replace=False)
    assert read_bytes(path) == b"first"
    assert write_bytes(path, b"third")
    assert read_bytes(path) == b"third"


def test_a_changed_file_has_another_stamp_and_is_fetched_again(root):
    path = join(root, "file")
    write_bytes(path, b"one")
    before = info(path)
    assert fetch(path).read_bytes() == b"one"
    write_bytes(path, b"two")
    assert info(path).stamp != before.stamp and fetch(path).read_bytes() == b"two"


def test_a_file_larger_than_a_part_arrives_complete(root, tmp_path):
    content = os.urandom(1000) * 40_000
    (tmp_path / "large").write_bytes(content)
    upload(tmp_path / "large", join(root, "large"))
    assert info(join(root, "large")).bytes == len(content) and read_bytes(join(root, "large")) == content
    assert fetch(join(root, "large")).read_bytes() == content


def test_the_file_that_shows_that_a_folder_is_complete_is_published_last(bucket, tmp_path, monkeypatch):
    for name in ("x", "sub/y", "stage.json", ".hidden"):
        write_bytes(tmp_path / "folder" / name, name)
    order = []
    monkeypatch.setattr(
        paths, "upload", lambda file, path, real=upload: (order.append(path), real(file, path))
    )
    publish_folder(tmp_path / "folder", "s3://bucket/out", last="stage.json")
    assert order[-1] == "s3://bucket/out/stage.json"
    assert [f.name for f in walk("s3://bucket/out")] == ["stage.json", "sub/y", "x"]


def test_an_object_whose_name_points_outside_the_folder_is_not_fetched(bucket, tmp_path):
    bucket.put_object(Key="evil/../../escaped.json", Body=b"{}")
    with pytest.raises(UserError, match="points outside its folder"):
        fetch_folder("s3://bucket/evil")
    assert not list(tmp_path.rglob("escaped.json"))


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("a/b", "/x", "/x/a/b"),
        ("../b", "/x/y", "/x/b"),
        ("/a", "/x", "/a"),
        ("s3://other/k", "/x", "s3://other/k"),
        ("a b/ü", "s3://bucket/m", "s3://bucket/m/a b/ü"),
        ("../k", "s3://bucket/m/n", "s3://bucket/m/k"),
        ("../../../../k", "s3://bucket/m", "s3://bucket/k"),
        ("/a", "s3://bucket/m", "/a"),
    ],
)
def test_a_relative_path_is_relative_to_the_given_folder(path, folder, expected):
    assert resolve(path, folder) == expected
