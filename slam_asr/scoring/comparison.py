"""Compares two recognisers on the same utterances: which one is better, and whether that may be chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slam_asr.artifacts.hypotheses import Hypothesis, scored_text
from slam_asr.artifacts.word_errors import Measured, groups_of, measure
from slam_asr.artifacts.writing_systems import comparable, separates_words
from slam_asr.errors import InputError
from slam_asr.scoring.analysis import percent
from slam_asr.scoring.statistics import matched_pairs

ALL = "all"
SIGNIFICANCE = 0.05
"""Probability below which a difference is called significant."""


@dataclass
class Compared:
    """The comparison of two recognisers on the same utterances; rates in percent."""

    subset: str
    utterances: int
    first: float
    second: float
    difference: float
    """First minus second, in percentage points: below 0 if the first is better."""
    low: float | None
    high: float | None
    """Limits of the difference's 95 % bootstrap interval in percentage points; None for one utterance."""
    p: float
    """Probability of a difference at least this large by chance alone."""
    differing: int
    """Number of utterances for which the two recognisers made different numbers of errors."""
    unit: str = "words"
    """What the rates count: `words`, or `characters` where words are not separated."""

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.p >= SIGNIFICANCE:
            return "may be chance"
        return "the first is better" if self.difference < 0 else "the second is better"


def compare_pairs(pairs: Sequence[tuple[Hypothesis, Hypothesis]], first: str, seed: int) -> list[Compared]:
    """Compare the two hypotheses of each utterance.

    Args:
        pairs: the two hypotheses of each utterance, as `pair` returns them.
        first: the first recogniser's name, for the error message.
        seed: seed of the resampling and of the random exchanges.

    Returns:
        One comparison per test subset, if the utterances come from several, and a last one over all of them.

    Raises:
        InputError: no reference contains a word.
    """
    a, b = (measure([pair[side] for pair in pairs]) for side in (0, 1))
    if not a.words.sum():
        raise InputError(
            f"The references of the {len(pairs)} utterances of {first} contain no words, "
            "so there is no rate to compare."
        )
    subsets = groups_of(a.rows, lambda row: row.subset)
    # A single subset would repeat the row of all utterances, and a subset without words has no rate.
    named = [(name, rows) for name, rows in subsets.items() if name and a.words[rows].sum()]
    groups = (named if len(subsets) > 1 else []) + [(ALL, np.arange(len(pairs)))]
    return [_compared(name, a, b, indices, seed) for name, indices in groups]


def pair(
    first: tuple[str, Sequence[Hypothesis]], second: tuple[str, Sequence[Hypothesis]], common: bool
) -> tuple[list[tuple[Hypothesis, Hypothesis]], dict[str, int]]:
    """Pair the utterances that both outputs have.

    Args:
        first: the first recogniser's name and its utterances.
        second: the same for the second recogniser.
        common: whether to leave out utterances that only one output has, instead of refusing both outputs.

    Returns:
        The pairs; and for each recogniser's name, the number of utterances that only its output has.

    Raises:
        InputError: the outputs have no utterance in common, or an utterance is in only one of them (unless
            `common`), is in one output twice, or has a different reference in each.
    """
    # SLAM-LLM's files name no subsets. If any utterance lacks its subset, all are paired by key alone.
    with_subset = all(row.subset for _, rows in (first, second) for row in rows)
    sides = [(name, _by_key(name, rows, with_subset)) for name, rows in (first, second)]
    left_out = {}
    for (name, rows), (other, others) in (sides, sides[::-1]):
        unpaired = sorted(rows.keys() - others.keys())
        # If the outputs have nothing in common, `common` does not help: no pair would be left.
        if unpaired and (not common or len(unpaired) == len(rows)):
            raise InputError(
                f"{name} has {len(unpaired)} utterances that {other} lacks, first {unpaired[0][0]}: "
                "compare outputs for the same test set"
                + ("." if common else ", or add --common true to compare only those that both have.")
            )
        left_out[name] = len(unpaired)
    (_, first_rows), (_, second_rows) = sides
    pairs = [(row, second_rows[key]) for key, row in first_rows.items() if key in second_rows]
    characters = not separates_words(a.reference for a, _ in pairs)

    def reference(row: Hypothesis) -> str:
        return scored_text(row.reference, characters)

    differing = [a.key for a, b in pairs if reference(a) != reference(b)]
    if differing:
        raise InputError(
            f"{first[0]} and {second[0]} have different references for {len(differing)} of {len(pairs)} "
            f"utterances, first {differing[0]}: their rates cannot be compared; decode both with manifests "
            "of the same data.text."
        )
    return pairs, left_out


def _by_key(name: str, rows: Sequence[Hypothesis], with_subset: bool) -> dict[tuple[str, str], Hypothesis]:
    """Return the utterances, keyed by (key, subset) or, without subsets, by (key, "")."""
    keyed = {(comparable(row.key), row.subset if with_subset else ""): row for row in rows}
    if len(keyed) < len(rows):
        raise InputError(
            f"{name} contains {len(rows) - len(keyed)} utterances more than once: each may occur only once."
        )
    return keyed


def _compared(name: str, a: Measured, b: Measured, indices: np.ndarray, seed: int) -> Compared:
    test = matched_pairs(a.errors[indices], b.errors[indices], a.words[indices], seed)
    # `percent` is None only if there are no reference words, and `compare_pairs` leaves out such subsets.
    return Compared(
        subset=name,
        utterances=len(indices),
        first=percent(a.total(indices)) or 0.0,
        second=percent(b.total(indices)) or 0.0,
        difference=round(100 * test.difference, 2),
        low=None if math.isnan(test.low) else round(100 * test.low, 2),
        high=None if math.isnan(test.high) else round(100 * test.high, 2),
        p=round(test.p, 5),
        differing=test.differing,
        unit=a.unit,
    )


def probability_text(p: float | None) -> str:
    """Format a p-value with three decimals; values below 0.001 become `< 0.001`, and None a dash."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
