"""Batches for decoding are planned by the lengths of the utterances."""

import pytest

from slam_asr.models.searcher import plan_batches


@pytest.mark.parametrize("beams", [1, 4])
def test_batches_contain_each_utterance_once_longest_first_within_the_budget(beams):
    lengths = [7, 300, 20, 20, 150, 33, 8]
    batches = plan_batches(lengths, max_new_tokens=40, beams=beams, budget=1000)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(7))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or (lengths[batch[0]] + 40) * beams * len(batch) <= 1000
