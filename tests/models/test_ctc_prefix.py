"""CTC's scores of prefixes equal sums over all paths."""

import itertools
import math

import pytest
import torch

from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling

OUTPUTS = 3
"""Number of CTC's outputs: column 0 is the blank."""
COLUMNS = torch.tensor([-1, -1, -1, -1, -1, 1, -1, 2, -1])
"""CTC's column of each of the LLM's 9 tokens: only the tokens 5 and 7 have one."""
STOPS = torch.tensor([1])
"""The LLM's token that ends an answer."""


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    """Return the columns that a path spells, without repetitions and blanks."""
    return tuple(c for c, _ in itertools.groupby(path) if c)


def probability(log_p: torch.Tensor, prefix: tuple[int, ...], complete: bool) -> float:
    """Return the probability of all paths that spell the prefix.

    If not `complete`, paths that spell a longer text with this prefix count too.
    """
    total = 0.0
    for path in itertools.product(range(OUTPUTS), repeat=len(log_p)):
        spelled = collapse(path)
        if spelled == prefix if complete else spelled[: len(prefix)] == prefix:
            total += math.exp(sum(float(log_p[t, c]) for t, c in enumerate(path)))
    return total


@pytest.mark.parametrize("prefix", [(5,), (5, 5), (5, 7), (7, 5)])
def test_scores_are_the_sums_over_all_paths(prefix):
    """A token's score is the change of the prefix's log probability.

    The score of an end is the log probability of the complete transcript minus that of the prefix.
    """
    torch.manual_seed(0)
    logits = torch.randn(6 + 4, OUTPUTS)
    scorer = CtcScorer(CtcSpelling.of(logits, [6, 4], COLUMNS, COLUMNS), 0.5, 1, STOPS)
    columns = tuple(int(COLUMNS[t]) for t in prefix)
    zeros = torch.zeros(2, 1, 9)  # an LLM without any preference
    parts = logits.log_softmax(1).split([6, 4])
    for step, token in enumerate(prefix):
        gains = scorer.add(zeros)[:, 0, token]
        for gain, part in zip(gains.tolist(), parts, strict=True):
            here = probability(part, columns[: step + 1], complete=False)
            before = probability(part, columns[:step], complete=False)
            assert gain == pytest.approx(0.5 * math.log(here / before), abs=1e-5)
        scorer.advance(torch.arange(2), torch.tensor([token, token]))
    ends = scorer.add(zeros)[:, 0, 1]
    for gain, part in zip(ends.tolist(), parts, strict=True):
        rest = probability(part, columns, complete=True) / probability(part, columns, complete=False)
        assert gain == pytest.approx(0.5 * math.log(rest), abs=1e-5)


def test_rows_follow_their_hypotheses():
    """Even if beams are swapped and an utterance leaves, a row is scored as if its utterance were alone."""
    torch.manual_seed(1)
    logits = torch.randn(5 + 5, OUTPUTS)
    both = CtcScorer(CtcSpelling.of(logits, [5, 5], COLUMNS, COLUMNS), 1.0, 2, STOPS)
    alone = CtcScorer(CtcSpelling.of(logits[5:], [5], COLUMNS, COLUMNS), 1.0, 2, STOPS)
    both.advance(torch.tensor([0, 0, 2, 2]), torch.tensor([5, 7, 5, 7]))
    alone.advance(torch.tensor([0, 0]), torch.tensor([5, 7]))
    # The first utterance leaves. The second one has rows 2 and 3, and each of its beams continues the other.
    both.advance(torch.tensor([3, 2]), torch.tensor([5, 5]))
    alone.advance(torch.tensor([1, 0]), torch.tensor([5, 5]))
    scores = both.add(torch.zeros(1, 2, 9))
    assert torch.allclose(scores, alone.add(torch.zeros(1, 2, 9)))
    assert not torch.allclose(scores[0, 0], scores[0, 1])


def test_unknown_tokens_stay_possible_and_the_order_of_the_audio_wins():
    """A token that CTC does not know has a finite score, far below that of the token that was spoken."""
    logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])  # 5, a blank, 7
    scorer = CtcScorer(CtcSpelling.of(logits, [3], COLUMNS, COLUMNS), 1.0, 1, STOPS)
    first = scorer.add(torch.zeros(1, 1, 9))[0, 0]
    assert first.argmax() == 5 and -30 < float(first[3]) < -10
    # First 5, then 7, then the end: nothing is left to spell.
    for token in (5, 7, 1):
        assert scorer.add(torch.zeros(1, 1, 9))[0, 0].argmax() == token
        scorer.advance(torch.tensor([0]), torch.tensor([token]))


def test_the_llm_chooses_if_the_audio_is_too_short_for_any_token():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    scorer = CtcScorer(CtcSpelling.of(logits, [1], COLUMNS, COLUMNS), 0.5, 1, STOPS)
    scorer.advance(torch.tensor([0]), torch.tensor([5]))
    preferences = torch.full((1, 1, 9), -8.0)
    preferences[0, 0, 3], preferences[0, 0, 7], preferences[0, 0, 1] = -0.5, -1.0, -torch.inf
    assert scorer.add(preferences)[0, 0].topk(2).indices.tolist() == [3, 7]


def test_audio_without_positions_has_the_scores_that_it_has_in_a_batch():
    none, some = torch.zeros(0, OUTPUTS), torch.zeros(1, OUTPUTS)
    scores = torch.zeros(1, 1, 9)
    alone = CtcScorer(CtcSpelling.of(none, [0], COLUMNS, COLUMNS), 0.5, 1, STOPS).add(scores)
    batched = CtcScorer(CtcSpelling.of(some, [1, 0], COLUMNS, COLUMNS), 0.5, 1, STOPS)
    assert torch.isfinite(alone).all()
    assert torch.equal(alone[0], batched.add(torch.zeros(2, 1, 9))[1])
