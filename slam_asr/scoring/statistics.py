"""How much of a word error rate may be chance: bootstrap intervals, and matched pairs of two recognisers.

The interval estimates which rates the same recogniser would have on other test sets of this size from the
same source (Bisani and Ney, 2004, "Bootstrap estimates for confidence intervals in ASR performance
evaluation"). Utterances of one speaker are alike, so with enough speakers the interval over speakers is wider
and more honest.
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
FLIPS, _AT_ONCE = 10_000, 500
MANY = 5000
"""Number of differing utterances above which the normal approximation replaces the randomisation test.

With that many, both give the same result.
"""
_LEVEL = (2.5, 97.5)


def interval(errors: np.ndarray, words: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of errors per word, as fractions.

    Args:
        errors: [units] word errors of each unit, which is an utterance or a speaker.
        words: [units] reference words of each unit.
        seed: seed of the resampling.

    Returns:
        Its lower and upper limit, or None with fewer than two units or no words.
    """
    if len(errors) < 2 or not words.sum():
        return None
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(RESAMPLES):
        sample = rng.integers(len(errors), size=len(errors))
        spoken = words[sample].sum()
        if spoken:
            rates.append(errors[sample].sum() / spoken)
    low, high = np.percentile(rates, _LEVEL)
    return float(low), float(high)


def interval_over(
    groups: dict[str, np.ndarray], errors: np.ndarray, words: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval over groups of utterances, such as speakers, which are drawn as units.

    Args:
        groups: indices of each group's utterances.
        errors: [utterances] word errors.
        words: [utterances] reference words.
        seed: seed of the resampling.

    Returns:
        Its lower and upper limit as fractions, or None with fewer than two groups or no words.
    """
    sums = [(errors[indices].sum(), words[indices].sum()) for indices in groups.values()]
    if not sums:
        return None
    group_errors, group_words = np.array(sums).T
    return interval(group_errors, group_words, seed)


@dataclass
class Difference:
    """The difference between two recognisers on the same utterances: first minus second."""

    difference: float
    """Difference of the word error rates, as a fraction: below 0 if the first is better."""
    low: float
    high: float
    """Limits of its 95 % bootstrap interval."""
    p: float
    """Probability of a difference at least as large if the two were equally good."""
    utterances: int
    differing: int
    """Utterances for which the two made different numbers of errors. The others do not affect p."""


def matched_pairs(first: np.ndarray, second: np.ndarray, words: np.ndarray, seed: int = 0) -> Difference:
    """Test whether one of two recognisers is better than the other, by matched pairs of utterances.

    If both were equally good, the two outputs for any utterance could be exchanged. The two-sided p-value is
    the share of random exchanges that give a difference at least as large (approximate randomisation, Noreen,
    1989). Above `MANY` utterances that differ, it is the normal approximation (Gillick and Cox, 1989).

    Args:
        first: [utterances] word errors of the first recogniser.
        second: [utterances] word errors of the second recogniser.
        words: [utterances] reference words; their sum must be above 0.
        seed: seed of the resampling and of the random exchanges.
    """
    differences = first - second
    low, high = interval(differences, words, seed) or (math.nan, math.nan)
    nonzero = differences[differences != 0]
    observed = abs(int(nonzero.sum()))
    if not len(nonzero):
        p = 1.0
    elif len(nonzero) > MANY:
        p = math.erfc(observed / math.sqrt(2 * float((nonzero.astype(float) ** 2).sum())))
    else:
        rng = np.random.default_rng(seed)
        signs = (2 * rng.integers(2, size=(_AT_ONCE, len(nonzero))) - 1 for _ in range(FLIPS // _AT_ONCE))
        as_large = sum(int((np.abs(batch @ nonzero) >= observed).sum()) for batch in signs)
        # Plus one: the observed assignment is one of the possible exchanges.
        p = (as_large + 1) / (FLIPS + 1)
    return Difference(float(differences.sum() / words.sum()), low, high, p, len(words), len(nonzero))
