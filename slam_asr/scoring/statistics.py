"""Uncertainty of word error rates: bootstrap intervals, and a test of two recognisers by matched pairs.

The interval estimates the rates that the same recogniser would have on other test sets of this size from the
same source (Bisani and Ney, 2004, "Bootstrap estimates for confidence intervals in ASR performance
evaluation"). Utterances of one speaker are alike and therefore not independent, so the interval over speakers
is wider. With enough speakers, it is also the more realistic one.
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
"""Number of random samples from which a bootstrap interval is computed."""
EXCHANGES, _AT_ONCE = 10_000, 500
"""Number of random exchanges in a randomisation test, and how many of them are in memory at once."""
MAX_RANDOMISED = 5000
"""Number of differing utterances above which the normal approximation replaces the randomisation test.

With so many utterances, both give the same result.
"""
_LEVEL = (2.5, 97.5)
"""Percentiles that limit a 95 % interval."""


def interval(errors: np.ndarray, words: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Compute the 95 % bootstrap interval of errors per word.

    Args:
        errors: int [units], word errors of each unit, which is an utterance or a speaker.
        words: int [units], reference words of each unit.
        seed: seed of the resampling.

    Returns:
        The lower and upper limit as fractions; None if there are fewer than two units or no words.
    """
    if len(errors) < 2 or not words.sum():
        return None
    rng = np.random.default_rng(seed)
    samples = (rng.integers(len(errors), size=len(errors)) for _ in range(RESAMPLES))
    # A rate is a ratio of sums: errors and words of a unit are drawn together, because long units have more
    # of both. A sample may consist only of units without words; such a sample has no rate.
    rates = [errors[sample].sum() / total for sample in samples if (total := words[sample].sum())]
    low, high = np.percentile(rates, _LEVEL)
    return float(low), float(high)


def interval_over(
    groups: dict[str, np.ndarray], errors: np.ndarray, words: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """Compute the 95 % bootstrap interval over groups of utterances, such as speakers, drawn as units.

    Args:
        groups: int [n], the indices of each group's utterances, keyed by the group's name.
        errors: int [utterances], word errors.
        words: int [utterances], reference words.
        seed: seed of the resampling.

    Returns:
        The lower and upper limit as fractions; None if there are fewer than two groups or no words.
    """
    sums = [(errors[indices].sum(), words[indices].sum()) for indices in groups.values()]
    group_errors, group_words = np.array(sums, dtype=np.int64).reshape(-1, 2).T
    return interval(group_errors, group_words, seed)


@dataclass
class Difference:
    """The difference between two recognisers on the same utterances: first minus second."""

    difference: float
    """Difference of the word error rates, as a fraction; negative if the first recogniser is better."""
    low: float
    """Lower limit of the difference's 95 % bootstrap interval; NaN if there is only one utterance."""
    high: float
    """Upper limit of that interval; NaN in the same case."""
    p: float
    """Probability of a difference at least as large, in either direction, if both were equally good."""
    differing: int
    """Number of utterances with different numbers of errors. All others have no effect on p."""


def matched_pairs(first: np.ndarray, second: np.ndarray, words: np.ndarray, seed: int = 0) -> Difference:
    """Test whether one of two recognisers is better than the other, by matched pairs of utterances.

    If both were equally good, the two outputs for any utterance could be exchanged. The two-sided p-value is
    the share of random exchanges that give a difference at least as large (approximate randomisation, Noreen,
    1989). If more than `MAX_RANDOMISED` utterances differ, the normal approximation is used instead (Gillick
    and Cox, 1989).

    Args:
        first: int [utterances], word errors of the first recogniser.
        second: int [utterances], word errors of the second recogniser.
        words: int [utterances], reference words; their sum must be above 0.
        seed: seed of the resampling and of the random exchanges.
    """
    differences = first - second
    low, high = interval(differences, words, seed) or (math.nan, math.nan)
    nonzero = differences[differences != 0]
    observed = abs(int(nonzero.sum()))
    if not len(nonzero):
        p = 1.0
    elif len(nonzero) > MAX_RANDOMISED:
        # With random signs, the sum of the differences has mean 0 and variance Σd². The two-sided tail of a
        # normal distribution beyond x is erfc(x / √(2 · variance)).
        p = math.erfc(observed / math.sqrt(2 * float((nonzero.astype(float) ** 2).sum())))
    else:
        rng = np.random.default_rng(seed)
        signs = (2 * rng.integers(2, size=(_AT_ONCE, len(nonzero))) - 1 for _ in range(EXCHANGES // _AT_ONCE))
        as_large = sum(int((np.abs(batch @ nonzero) >= observed).sum()) for batch in signs)
        # Plus one, because the observed assignment is itself one of the possible exchanges.
        p = (as_large + 1) / (EXCHANGES + 1)
    return Difference(float(differences.sum() / words.sum()), low, high, p, len(nonzero))
