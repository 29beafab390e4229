"""Controls: no utterance retains its own audio, and empty output has a word error rate of 100 %."""

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import measure
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
    assert measure(empty_output(ROWS)).total().wer == 1.0
