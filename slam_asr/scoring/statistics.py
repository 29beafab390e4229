"""How far a word error rate may be chance: bootstrap intervals, and matched pairs of two recognisers.

The interval says what rates the same recogniser would give on other test sets of this size, drawn from where this one was
(Bisani and Ney, 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation"). Utterances of one speaker
are alike, so the interval over speakers is the wider and the more honest one, where there are speakers enough.
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
FLIPS, _AT_ONCE = 10_000, 500
MANY = 5000
"""Utterances that differ, above which the randomisation test and its normal approximation say the same."""
_LEVEL = (2.5, 97.5)


def interval(errors: np.ndarray, words: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of errors per word, as fractions.

    Args:
        errors: [units] wrong words of each utterance, or of each speaker.
        words: [units] reference words of each.
        seed: of the resampling.

    Returns:
        Its ends, or None where there are fewer than two units or no words.
    """
    if len(errors) < 2 or not words.sum():
        return None
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(errors), size=len(errors))
        spoken = words[drawn].sum()
        if spoken:
            rates.append(errors[drawn].sum() / spoken)
    low, high = np.percentile(rates, _LEVEL)
    return float(low), float(high)


def interval_over(
    groups: dict[str, np.ndarray], errors: np.ndarray, words: np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval where whole groups of utterances, such as speakers, are drawn.

    Args:
        groups: numbers of the utterances of each.
        errors: [utterances].
        words: [utterances].
        seed: of the resampling.
    """
    sums = [(errors[chosen].sum(), words[chosen].sum()) for chosen in groups.values()]
    return interval(*np.array(sums).T, seed) if sums else None


@dataclass
class Difference:
    """Of two recognisers on the same utterances: first minus second."""

    difference: float
    """Of the word error rates, as a fraction: below 0 where the first is better."""
    low: float
    high: float
    """Ends of its 95 % bootstrap interval."""
    p: float
    """Probability of a difference at least as large if the two were equally good."""
    utterances: int
    differing: int
    """Utterances with unequal numbers of errors; the others decide nothing."""


def matched_pairs(first: np.ndarray, second: np.ndarray, words: np.ndarray, seed: int = 0) -> Difference:
    """Whether one of two recognisers is better than the other, utterance by utterance.

    If both were equally good, the two outputs of any utterance could be exchanged; the p-value is the share of exchanges that
    give a difference as large (approximate randomisation, Noreen, 1989), two-sided, and its normal approximation
    (Gillick and Cox, 1989) above 5 000 utterances that differ.

    Args:
        first: [utterances] wrong words of the first one.
        second: [utterances] wrong words of the second one.
        words: [utterances] reference words; at least one in all.
        seed: of resampling and exchanges.
    """
    differences = first - second
    low, high = interval(differences, words, seed) or (math.nan, math.nan)
    telling = differences[differences != 0]
    seen = abs(int(telling.sum()))
    if not len(telling):
        p = 1.0
    elif len(telling) > MANY:
        p = math.erfc(seen / math.sqrt(2 * float((telling.astype(float) ** 2).sum())))
    else:
        rng = np.random.default_rng(seed)
        signs = (2 * rng.integers(2, size=(_AT_ONCE, len(telling))) - 1 for _ in range(FLIPS // _AT_ONCE))
        as_large = sum(int((np.abs(some @ telling) >= seen).sum()) for some in signs)
        p = (as_large + 1) / (FLIPS + 1)
    return Difference(float(differences.sum() / words.sum()), low, high, p, len(words), len(telling))
