"""Every utterance is in one split at most, and the choice depends on names and keys alone."""

import pytest

from slam_asr.corpora.librispeech import LibriSpeech
from slam_asr.corpora.splits import choose_subsets, held_out, normalise
from slam_asr.errors import UserError
from slam_asr.recipe import Data

KEYS = [f"{speaker}-{chapter}-{n:04d}" for speaker in range(10) for chapter in range(10) for n in range(20)]


def reader(tmp_path, *subsets: str) -> LibriSpeech:
    return LibriSpeech(tmp_path, {name: tmp_path / name for name in subsets})


def test_patterns_choose_subsets(tmp_path):
    found = reader(
        tmp_path, "dev-clean", "dev-other", "test-clean", "test-other", "train-clean-100", "train-other-500"
    )
    assert choose_subsets(found, Data()) == {
        "train": ["train-clean-100", "train-other-500"],
        "dev": ["dev-other"],
        "test": ["test-clean", "test-other"],
    }
    narrow = Data(train=["train-clean-[0-9]*"], dev=["dev-*"], test=["test-other"])
    assert choose_subsets(found, narrow)["train"] == ["train-clean-100"]


def test_a_subset_called_like_a_split_is_that_split_whatever_the_patterns(tmp_path):
    found = reader(tmp_path, "train", "dev", "test")
    assert choose_subsets(found, Data(train=["*"])) == {"train": ["train"], "dev": ["dev"], "test": ["test"]}


@pytest.mark.parametrize(("missing", "pattern"), [("train", "train-*"), ("test", "test-*")])
def test_a_split_without_a_subset_is_refused_with_the_patterns_and_what_there_is(tmp_path, missing, pattern):
    have = {"train": "train-a", "test": "test-a"}
    have[missing] = "other"
    with pytest.raises(UserError) as caught:
        choose_subsets(reader(tmp_path, *have.values()), Data())
    assert all(part in str(caught.value) for part in (f"data.{missing}", pattern, *have.values()))


def test_a_subset_in_two_splits_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="subset test-x is in train and in test"):
        choose_subsets(reader(tmp_path, "train-x", "test-x"), Data(train=["*"]))


def test_the_share_held_out_is_about_what_was_asked_for():
    assert len(held_out(KEYS, 0.05)) == pytest.approx(0.05 * len(KEYS), rel=0.25)


def test_a_key_is_held_out_or_not_whatever_the_others_are():
    some = KEYS[::3]
    assert held_out(some, 0.05) == held_out(KEYS, 0.05) & set(some)
    assert held_out(KEYS[::-1], 0.05) == held_out(KEYS, 0.05)
    assert held_out(KEYS, 0.05) < held_out(KEYS, 0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_at_least_one_is_held_out(fraction):
    assert len(held_out(KEYS[:3], fraction)) == 1


@pytest.mark.parametrize(
    ("case", "written"), [("lower", "it's a café"), ("upper", "IT'S A CAFÉ"), ("as-is", "It's a CAFÉ")]
)
def test_transcripts_have_one_case_and_single_spaces(case, written):
    assert normalise("  It's\ta \u00a0 CAFÉ\n", case) == written
