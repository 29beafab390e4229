"""A LibriSpeech tree gives a candidate for each transcript with audio; incomplete utterances are rejected."""

import pytest

from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate, Rejection
from slam_asr.corpora.librispeech import LibriSpeech
from slam_asr.errors import UserError
from tests.conftest import write_librispeech, write_wav

SUBSETS = {
    "train-x": {"1-2-0000": "ONE TWO", "1-2-0001": "THREE", "4-5-0000": "FOUR"},
    "test-x": {"9-9-0000": "NINE"},
}


def read_all(reader: LibriSpeech, subset: str):
    return list(reader.read(subset))


def test_each_transcript_with_audio_is_a_candidate(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    reader = LibriSpeech.find(str(tmp_path), Data())
    assert reader.subsets() == ["test-x", "train-x"]
    assert read_all(reader, "train-x")[1] == Candidate(
        "1-2-0001",
        str(tmp_path / "train-x/1/2/1-2-0001.wav"),
        "THREE",
        {"subset": "train-x", "speaker": "1", "chapter": "2"},
    )
    assert [c.key for c in read_all(reader, "train-x")] == ["1-2-0000", "1-2-0001", "4-5-0000"]


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg", ".opus", ".mp3"])
def test_each_kind_of_audio_file_that_needs_no_pyav_is_found(tmp_path, suffix):
    write_librispeech(tmp_path, SUBSETS, suffix)
    assert all(isinstance(c, Candidate) for c in read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x"))


def test_the_outer_folder_of_the_archives_is_optional(tmp_path):
    write_librispeech(tmp_path / "LibriSpeech", SUBSETS)
    (tmp_path / "LibriSpeech" / "README.TXT").touch()
    assert LibriSpeech.find(str(tmp_path), Data()).subsets() == ["test-x", "train-x"]


def test_a_single_subset_may_be_the_corpus(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    reader = LibriSpeech.find(str(tmp_path / "train-x"), Data())
    assert reader.subsets() == ["train-x"]
    assert [c.key for c in read_all(reader, "train-x")] == ["1-2-0000", "1-2-0001", "4-5-0000"]


def test_folders_of_other_layouts_are_not_recognised(tmp_path):
    assert LibriSpeech.find(str(tmp_path), Data()) is None
    write_wav(tmp_path / "wav" / "speaker" / "chapter" / "x.wav")
    assert LibriSpeech.find(str(tmp_path), Data()) is None
    assert LibriSpeech.find(str(tmp_path / "wav" / "speaker" / "chapter" / "x.wav"), Data()) is None
    write_librispeech(tmp_path, SUBSETS)
    (tmp_path / "logs" / "a").mkdir(parents=True)
    assert "logs" not in LibriSpeech.find(str(tmp_path), Data()).subsets()


def test_transcripts_without_audio_and_audio_without_transcript_are_rejected(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    chapter = tmp_path / "train-x/1/2"
    (chapter / "1-2-0000.wav").unlink()
    write_wav(chapter / "1-2-0007.wav")
    (tmp_path / "train-x/4/5/4-5.trans.txt").unlink()
    items = read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x")
    assert [(r.key, r.reason) for r in items if isinstance(r, Rejection)] == [
        ("1-2-0000", "transcript without audio"),
        ("1-2-0007", "audio without transcript"),
        ("4-5-0000", "audio without transcript"),
    ]
    assert [c.key for c in items if isinstance(c, Candidate)] == ["1-2-0001"]


def test_a_second_line_for_a_key_is_rejected(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    with open(tmp_path / "train-x/1/2/1-2.trans.txt", "a", encoding="utf-8") as file:
        file.write("1-2-0000 ANOTHER TEXT\n")
    items = read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x")
    assert [(r.key, r.reason) for r in items if isinstance(r, Rejection)] == [("1-2-0000", "duplicate key")]
    assert [c.text for c in items if isinstance(c, Candidate)] == ["ONE TWO", "THREE", "FOUR"]


def test_a_line_without_text_is_a_candidate_with_an_empty_transcript(tmp_path):
    write_librispeech(tmp_path, {"train-x": {"1-2-0000": "", "1-2-0001": "A\tB"}})
    assert [(c.key, c.text) for c in read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x")] == [
        ("1-2-0000", ""),
        ("1-2-0001", "A\tB"),
    ]


def test_the_lossless_file_is_preferred_if_a_key_has_two(tmp_path):
    write_librispeech(tmp_path, SUBSETS, ".mp3")
    write_wav(tmp_path / "train-x/1/2/1-2-0000.flac")
    assert read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x")[0].source.endswith("1-2-0000.flac")


def test_hidden_files_are_ignored(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    (tmp_path / "train-x/1/2/._1-2-0000.wav").write_bytes(b"resource fork")
    (tmp_path / "train-x/1/2/._1-2.trans.txt").write_bytes(b"\x00\xff")
    assert all(isinstance(c, Candidate) for c in read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x"))


def test_the_error_for_transcripts_that_are_not_utf8_names_the_file(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    (tmp_path / "train-x/1/2/1-2.trans.txt").write_bytes("1-2-0000 CAFÉ\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"1-2\.trans\.txt is not UTF-8"):
        read_all(LibriSpeech.find(str(tmp_path), Data()), "train-x")


def test_stamps_change_with_every_relevant_file_and_only_with_these(tmp_path):
    write_librispeech(tmp_path, SUBSETS)
    reader = LibriSpeech.find(str(tmp_path), Data())
    before = list(reader.stamps("train-x"))
    (tmp_path / "train-x/1/2/notes.md").touch()
    (tmp_path / "test-x/9/9/9-9-0000.wav").unlink()
    assert list(reader.stamps("train-x")) == before
    for path in ("train-x/1/2/1-2-0000.wav", "train-x/4/5/4-5.trans.txt"):
        with open(tmp_path / path, "ab") as file:
            file.write(b"\n")
        changed = list(reader.stamps("train-x"))
        assert changed != before
        before = changed
