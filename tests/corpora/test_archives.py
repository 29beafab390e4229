"""Unpacking an archive takes limited disk space and memory, and writes nothing outside the target folder."""

import gzip
import io
import json
import tarfile
import tracemalloc

import pytest

from slam_asr.corpora import archives
from slam_asr.errors import InputError
from tests.conftest import write_wav
from tests.corpora.test_kinds import cut, read_all


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def unpack(file, folder) -> None:
    archives._unpack_once(str(file), folder / "audio", ["train-a"])


def test_an_archive_that_unpacks_to_more_than_100_times_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MIN_ALLOWANCE", 2**16)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        for number in range(4):
            add(archive, f"train-a/1/1/1-1-000{number}.wav", bytes(2**20))
    with pytest.raises(InputError, match="more than 100 times its size"):
        unpack(tmp_path / "bomb.tar.gz", tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.wav")) <= 2**20
    assert not list((tmp_path / "audio").glob(".*.unpacked")), (
        "with a marker, the archive would count as unpacked"
    )


def test_an_archive_that_does_not_fit_on_the_disk_is_refused_before_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "train-a/1/1/1-1-0000.wav", bytes(2000))
    with pytest.raises(InputError, match=r"does not fit on the disk: .* has 2000 bytes, and 1000 are free"):
        unpack(tmp_path / "x.tar", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_a_huge_name_in_an_archive_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "././@LongLink", bytes(2**21), type=kind)
        add(archive, "train-a/1/1/1-1-0000.wav", b"RIFF")
    with pytest.raises(InputError, match=r"cannot be unpacked \(a header of 2097152 bytes\)"):
        unpack(tmp_path / "x.tar.gz", tmp_path)


def test_absolute_paths_links_and_devices_are_not_unpacked(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    good = write_wav(tmp_path / "good.wav").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        # The first member is a link to a folder outside, the second is a file whose path goes through it.
        add(archive, "train-a/1/link", type=tarfile.SYMTYPE, linkname=str(outside))
        add(archive, "train-a/1/link/1-1-0001.wav", good)
        add(archive, f"{outside}/1-1-0002.wav", good)
        add(archive, "../outside/1/1-1-0003.wav", good)
        add(archive, "train-a/1/1/1-1-0004.wav", type=tarfile.LNKTYPE, linkname="/etc/passwd")
        add(archive, "train-a/1/1/1-1-0005.wav", type=tarfile.FIFOTYPE)
        add(archive, "train-a/1/1/1-1-0006.wav", good)
    unpack(tmp_path / "x.tar", tmp_path / "out")
    files = [f for f in (tmp_path / "out").rglob("*") if not f.is_dir() and f.suffix == ".wav"]
    assert sorted(f.name for f in files) == ["1-1-0001.wav", "1-1-0006.wav"]
    assert not any(f.is_symlink() for f in (tmp_path / "out").rglob("*"))
    assert list(outside.iterdir()) == []


def test_a_compressed_line_that_is_too_long_is_refused_before_it_is_read_to_its_end(tmp_path):
    with gzip.open(tmp_path / "cuts_train.jsonl.gz", "wb") as file:
        file.write(json.dumps(cut("c", "a.wav", "x")).encode() + b"\n")
        file.write(bytes(2**27))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"line 2 cannot be read as JSON \(it is longer than 64 MiB\)"):
        read_all(tmp_path / "cuts_train.jsonl.gz")
    assert tracemalloc.get_traced_memory()[1] < 1.2 * 2**27
    tracemalloc.stop()
