"""The command `slam-asr compare A B`: finds which of two recognisers is better.

It also tests whether the difference is significant, so that chance is not taken for progress.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slam_asr.artifacts.hypotheses import HYPOTHESES, Hypothesis, normalise
from slam_asr.artifacts.word_errors import Measured, groups_of, measure
from slam_asr.errors import InputError
from slam_asr.progress import log_line
from slam_asr.scoring.analysis import percent
from slam_asr.scoring.outputs import read_output
from slam_asr.scoring.statistics import matched_pairs
from slam_asr.storage import write_json

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
    low: float
    high: float
    """Limits of the difference's 95 % bootstrap interval, in percentage points."""
    p: float
    """Probability of a difference at least this large by chance alone."""
    differing: int
    """Utterances for which the two made different numbers of errors."""

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.p >= SIGNIFICANCE:
            return "may be chance"
        return "the first is better" if self.difference < 0 else "the second is better"


def compare(
    first: str, second: str, output: str | None = None, common: bool = False, seed: int = 0
) -> list[Compared]:
    """Compare the word error rates of two recognisers on the same utterances, by matched pairs.

    Args:
        first: output of the first recogniser: the folder that decode or score wrote, the hypotheses.jsonl in
            it, or SLAM-LLM's `…_pred` with its `…_gt` next to it.
        second: output of the second recogniser, in any of the same forms.
        output: a JSON file to write the numbers to.
        common: compare only the utterances that both outputs have, and count the others. By default, an
            utterance that only one output has is an error.
        seed: seed of the resampling and of the random exchanges.

    Returns:
        One comparison per test subset, if the utterances come from several, and a last one over all of them.

    Raises:
        InputError: an utterance is in only one output or has different references in the two, or no
            reference contains a word.
    """
    outputs = [(path, read_output(path, HYPOTHESES)) for path in (first, second)]
    pairs, left_out = _paired(outputs[0], outputs[1], common)
    rows = _by_subset(pairs, first, seed)
    _print(rows, first, second, left_out)
    if output:
        write_json(
            output,
            {
                "first": first,
                "second": second,
                "unit": "percent",
                "left_out": left_out,
                "compared": [asdict(row) for row in rows],
            },
        )
    return rows


def compare_outputs(
    first: tuple[str, Sequence[Hypothesis]], second: tuple[str, Sequence[Hypothesis]], seed: int = 0
) -> list[Compared]:
    """Compare utterances that are already loaded.

    Args:
        first: the first recogniser's name, for error messages, and its utterances.
        second: the same for the second recogniser.
        seed: seed of the resampling and of the random exchanges.

    Returns:
        As from `compare`.

    Raises:
        InputError: as for `compare`.
    """
    return _by_subset(_paired(first, second, common=False)[0], first[0], seed)


def _by_subset(pairs: Sequence[tuple[Hypothesis, Hypothesis]], first: str, seed: int) -> list[Compared]:
    a, b = (measure([pair[side] for pair in pairs]) for side in (0, 1))
    if not a.words.sum():
        raise InputError(
            f"The references of the {len(pairs)} utterances of {first} contain no words, "
            "so there is no rate to compare."
        )
    subsets = groups_of(a.rows, lambda row: row.subset)
    # A single subset would repeat the row of all utterances, and a subset without words has no rate.
    comparable = (
        {name: indices for name, indices in subsets.items() if name and a.words[indices].sum()}
        if len(subsets) > 1
        else {}
    )
    return [
        _compared(name, a, b, indices, seed)
        for name, indices in [*comparable.items(), (ALL, np.arange(len(pairs)))]
    ]


def _paired(
    first: tuple[str, Sequence[Hypothesis]], second: tuple[str, Sequence[Hypothesis]], common: bool
) -> tuple[list[tuple[Hypothesis, Hypothesis]], dict[str, int]]:
    """Pair the utterances that both outputs have, and count those that only one has, by that one's path."""
    # SLAM-LLM's files name no subsets. If any utterance lacks its subset, all are paired by key alone.
    with_subset = all(row.subset for _, rows in (first, second) for row in rows)
    sides = [(path, _by_name(path, rows, with_subset)) for path, rows in (first, second)]
    left_out = {}
    for (path, rows), (other, others) in (sides, sides[::-1]):
        unpaired = sorted(rows.keys() - others.keys())
        if unpaired and (not common or len(unpaired) == len(rows)):
            raise InputError(
                f"{path} has {len(unpaired)} utterances that {other} lacks, first {unpaired[0][0]}: "
                "compare outputs for the same test set"
                + ("." if common else ", or add --common true to compare what both have.")
            )
        left_out[path] = len(unpaired)
    pairs = [(row, sides[1][1][name]) for name, row in sides[0][1].items() if name in sides[1][1]]
    differing = [a.key for a, b in pairs if normalise(a.reference) != normalise(b.reference)]
    if differing:
        raise InputError(
            f"{first[0]} and {second[0]} have different references for {len(differing)} of {len(pairs)} "
            f"utterances, first {differing[0]}: their rates cannot be compared; decode both with manifests "
            "of the same data.text."
        )
    return pairs, left_out


def _by_name(path: str, rows: Sequence[Hypothesis], with_subset: bool) -> dict[tuple[str, str], Hypothesis]:
    named = {(row.key, row.subset if with_subset else ""): row for row in rows}
    if len(named) < len(rows):
        raise InputError(
            f"{path} contains {len(rows) - len(named)} utterances more than once: each may occur only once."
        )
    return named


def _compared(name: str, a: Measured, b: Measured, indices: np.ndarray, seed: int) -> Compared:
    test = matched_pairs(a.errors[indices], b.errors[indices], a.words[indices], seed)
    return Compared(
        subset=name,
        utterances=len(indices),
        first=percent(a.total(indices)) or 0.0,
        second=percent(b.total(indices)) or 0.0,
        difference=round(100 * test.difference, 2),
        low=round(100 * test.low, 2),
        high=round(100 * test.high, 2),
        p=round(test.p, 5),
        differing=test.differing,
    )


def _print(rows: Sequence[Compared], first: str, second: str, left_out: dict[str, int]) -> None:
    log_line(f"first:  {first}")
    log_line(f"second: {second}")
    for path, count in left_out.items():
        if count:
            log_line(f"left out: {count} utterances that only {path} has")
    head: tuple[Any, ...] = ("subset", "utterances", "first", "second", "difference", "95 % interval", "p")
    table = [
        head,
        *(
            (
                r.subset,
                r.utterances,
                f"{r.first:.2f} %",
                f"{r.second:.2f} %",
                f"{r.difference:+.2f}",
                f"{r.low:+.2f} to {r.high:+.2f}",
                probability_text(r.p),
            )
            for r in rows
        ),
    ]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(head))]
    for cells, verdict in zip(table, ["", *(row.verdict for row in rows)], strict=True):
        log_line(
            "  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True))
            + "  "
            + verdict
        )


def probability_text(p: float) -> str:
    """Format a p-value with three decimals; values below 0.001 become `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
