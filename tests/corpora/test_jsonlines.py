"""In a folder, all lines of train.jsonl, dev.jsonl and test.jsonl are in the subset of that name.

In other files, a line may name its subset. If it names none, it is in the subset named like its file.
"""

import json

import pytest

from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate, Rejection
from slam_asr.corpora.jsonlines import JsonLines
from slam_asr.errors import UserError
from tests.conftest import write_wav


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(key: str, **fields) -> dict:
    return {"key": key, "source": "x.wav", "target": key.upper()} | fields


@pytest.fixture
def folder(tmp_path):
    write_wav(tmp_path / "x.wav")
    return tmp_path


def test_a_file_named_after_a_split_is_that_split_whatever_subset_its_lines_name(folder):
    write_lines(folder / "train.jsonl", row("a"), row("b", subset="train-clean-100"))
    write_lines(folder / "test.jsonl", row("c", subset="test-other", speaker="7"))
    reader = JsonLines.find(str(folder), Data())
    assert reader.subsets() == ["test", "train"]
    assert [c.extra["subset"] for c in reader.read("train")] == ["train", "train-clean-100"]
    assert list(reader.read("test")) == [
        Candidate("c", str(folder / "x.wav"), "C", {"subset": "test-other", "speaker": "7"})
    ]


def test_files_may_be_named_after_subsets(folder):
    write_lines(folder / "train-clean-100.jsonl", row("a"))
    write_lines(folder / "test-other.jsonl", row("b"))
    reader = JsonLines.find(str(folder), Data())
    assert reader.subsets() == ["test-other", "train-clean-100"]
    assert [c.extra for c in reader.read("test-other")] == [{"subset": "test-other"}]


@pytest.mark.parametrize("name", ["all.jsonl", "train.jsonl"])
def test_the_lines_of_one_file_may_name_their_subsets(folder, name):
    path = write_lines(folder / name, row("a", subset="train-x"), row("b", subset="test-x"), row("c"))
    reader = JsonLines.find(str(path), Data())
    assert reader.subsets() == sorted(["test-x", "train-x", path.stem])


def test_the_rejections_of_an_earlier_build_are_not_read(folder):
    write_lines(folder / "train.jsonl", row("a"))
    write_lines(folder / "rejected.jsonl", {"key": "z", "source": "", "reason": "too short"})
    assert JsonLines.find(str(folder), Data()).subsets() == ["train"]


def test_a_line_without_its_audio_is_rejected(folder):
    write_lines(folder / "train.jsonl", row("a"), row("b", source="gone.wav"))
    _, rejection = JsonLines.find(str(folder), Data()).read("train")
    assert isinstance(rejection, Rejection)
    assert (rejection.key, rejection.source, rejection.reason) == (
        "b",
        str(folder / "gone.wav"),
        "transcript without audio",
    )


def test_the_error_for_a_bad_line_names_its_file_and_line_number(folder):
    write_lines(folder / "train.jsonl", row("a"), {"key": "b"})
    with pytest.raises(UserError, match=r"train\.jsonl, line 2 has no source and no target"):
        JsonLines.find(str(folder), Data())


@pytest.mark.parametrize("subset", [7, "", ["x"]])
def test_a_subset_that_is_not_text_is_refused(folder, subset):
    write_lines(folder / "all.jsonl", row("a", subset=subset))
    with pytest.raises(UserError, match="line 1: subset must be text"):
        JsonLines.find(str(folder), Data())


def test_sources_with_an_unsupported_scheme_are_refused(folder):
    write_lines(folder / "train.jsonl", row("a", source="https://somewhere/x.wav"))
    with pytest.raises(UserError, match=r"train\.jsonl.*https"):
        JsonLines.find(str(folder), Data())


def test_segments_and_complete_files_are_read(folder):
    write_lines(
        folder / "train.jsonl",
        row("a", start=0.5, duration=0.25, source="s3://bucket/x.wav"),
        row("b", duration=9),
    )
    segment, complete = JsonLines.find(str(folder), Data()).read("train")
    assert (segment.source, segment.start, segment.duration) == ("s3://bucket/x.wav", 0.5, 0.25)
    assert (complete.start, complete.duration) == (None, None), (
        "the duration of a complete file is measured, not taken from its line"
    )


def test_folders_and_files_without_json_lines_are_not_recognised(folder):
    assert JsonLines.find(str(folder), Data()) is None
    assert JsonLines.find(str(folder / "x.wav"), Data()) is None


def test_a_subsets_stamps_do_not_depend_on_files_without_its_lines(folder):
    write_lines(folder / "train.jsonl", row("a"))
    path = write_lines(folder / "test.jsonl", row("b"))
    before = list(JsonLines.find(str(folder), Data()).stamps("train"))
    write_lines(path, row("b"), row("c"))
    assert list(JsonLines.find(str(folder), Data()).stamps("train")) == before


def test_stamps_change_when_the_audio_or_the_lines_change(folder):
    path = write_lines(folder / "train.jsonl", row("a"))
    before = list(JsonLines.find(str(folder), Data()).stamps("train"))
    with open(folder / "x.wav", "ab") as file:
        file.write(b"\0")
    audio_changed = list(JsonLines.find(str(folder), Data()).stamps("train"))
    write_lines(path, row("a"), row("b"))
    assert (
        len({str(before), str(audio_changed), str(list(JsonLines.find(str(folder), Data()).stamps("train")))})
        == 3
    )
