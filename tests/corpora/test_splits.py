"""Every utterance is in at most one split, which depends only on its subset's name and its key."""

import pytest

from slam_asr.config.recipe import Data
from slam_asr.corpora.librispeech import LibriSpeech
from slam_asr.corpora.splits import choose_subsets, held_out, normalise
from slam_asr.errors import UserError

KEYS = [f"{speaker}-{chapter}-{n:04d}" for speaker in range(10) for chapter in range(10) for n in range(20)]


def reader(tmp_path, *subsets: str) -> LibriSpeech:
    return LibriSpeech(str(tmp_path), {name: str(tmp_path / name) for name in subsets})


def test_patterns_choose_subsets(tmp_path):
    corpus = reader(
        tmp_path, "dev-clean", "dev-other", "test-clean", "test-other", "train-clean-100", "train-other-500"
    )
    assert choose_subsets(corpus, Data()) == {
        "train": ["train-clean-100", "train-other-500"],
        "dev": ["dev-other"],
        "test": ["test-clean", "test-other"],
    }
    narrow = Data(train=["train-clean-[0-9]*"], dev=["dev-*"], test=["test-other"])
    assert choose_subsets(corpus, narrow)["train"] == ["train-clean-100"]


def test_a_subset_named_after_a_split_belongs_to_it_whatever_the_patterns(tmp_path):
    corpus = reader(tmp_path, "train", "dev", "test")
    assert choose_subsets(corpus, Data(train=["*"])) == {"train": ["train"], "dev": ["dev"], "test": ["test"]}


@pytest.mark.parametrize(("missing", "pattern"), [("train", "train-*"), ("test", "test-*")])
def test_the_error_for_a_split_without_a_subset_lists_patterns_and_subsets(tmp_path, missing, pattern):
    subsets = {"train": "train-a", "test": "test-a"}
    subsets[missing] = "other"
    with pytest.raises(UserError) as caught:
        choose_subsets(reader(tmp_path, *subsets.values()), Data())
    assert all(part in str(caught.value) for part in (f"data.{missing}", pattern, *subsets.values()))


def test_the_error_for_a_subset_in_two_splits_names_it(tmp_path):
    with pytest.raises(UserError, match="subset test-x is in train and in test"):
        choose_subsets(reader(tmp_path, "train-x", "test-x"), Data(train=["*"]))


def test_about_the_requested_share_is_held_out():
    assert len(held_out(KEYS, 0.05)) == pytest.approx(0.05 * len(KEYS), rel=0.25)


def test_whether_a_key_is_held_out_does_not_depend_on_other_keys():
    some = KEYS[::3]
    assert held_out(some, 0.05) == held_out(KEYS, 0.05) & set(some)
    assert held_out(KEYS[::-1], 0.05) == held_out(KEYS, 0.05)
    assert held_out(KEYS, 0.05) < held_out(KEYS, 0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_at_least_one_key_is_held_out(fraction):
    assert len(held_out(KEYS[:3], fraction)) == 1


@pytest.mark.parametrize(
    ("case", "written"), [("lower", "it's a café"), ("upper", "IT'S A CAFÉ"), ("as-is", "It's a CAFÉ")]
)
def test_transcripts_are_converted_to_one_case_and_single_spaces(case, written):
    assert normalise("  It's\ta \u00a0 CAFÉ\n", case) == written
