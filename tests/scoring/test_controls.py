"""Controls: no utterance retains its own audio, and empty output scores 100 %."""

import pytest

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import score
from slam_asr.models.searcher import plan_batches
from slam_asr.scoring.controls import empty_output, shuffled_audio

ROWS = [Hypothesis(f"k{i}", f"reference {i}", f"said {i}", subset="ab"[i % 2]) for i in range(21)]


def test_every_utterance_gets_the_audio_of_another_of_its_subset():
    shuffled = {row.key: row for row in shuffled_audio(ROWS, seed=0)}
    assert len(shuffled) == len(ROWS)
    by_hypothesis = {row.hypothesis: row for row in ROWS}
    for row in ROWS:
        other = by_hypothesis[shuffled[row.key].hypothesis]
        assert other.key != row.key and other.subset == row.subset
        assert shuffled[row.key].reference == row.reference
    assert sorted(r.hypothesis for r in shuffled.values()) == sorted(r.hypothesis for r in ROWS)


def test_a_single_utterance_is_left_out():
    assert shuffled_audio(ROWS[:1], seed=0) == []


def test_the_shuffle_depends_only_on_its_seed():
    assert shuffled_audio(ROWS, 0) == shuffled_audio(list(reversed(ROWS)), 0) != shuffled_audio(ROWS, 1)


def test_empty_output_is_all_deletions():
    assert score(empty_output(ROWS)).wer == 1.0


@pytest.mark.parametrize("beams", [1, 4])
def test_batches_contain_each_utterance_once_longest_first_within_the_budget(beams):
    lengths = [7, 300, 20, 20, 150, 33, 8]
    batches = list(plan_batches(lengths, max_new_tokens=40, beams=beams, budget=1000))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(7))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or (lengths[batch[0]] + 40) * beams * len(batch) <= 1000
