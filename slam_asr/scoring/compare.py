"""`slam-asr compare A B`: which of two recognisers is better, and whether that may be chance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slam_asr.errors import UserError
from slam_asr.progress import log_line
from slam_asr.scoring.analysis import percent
from slam_asr.scoring.metrics import Measured, groups_of, measure
from slam_asr.scoring.outputs import read_output
from slam_asr.scoring.score import HYPOTHESES
from slam_asr.scoring.statistics import matched_pairs
from slam_asr.scoring.wer import Hypothesis, normalise
from slam_asr.storage import write_json

ALL = "all"
SURE = 0.05
"""Probability below which a difference is called significant."""


@dataclass
class Compared:
    """Two recognisers on the same utterances; rates in percent."""

    subset: str
    utterances: int
    first: float
    second: float
    difference: float
    """First minus second, in points of percent: below 0 where the first is better."""
    low: float
    high: float
    """Ends of its 95 % bootstrap interval."""
    p: float
    differing: int
    """Utterances with unequal numbers of errors."""

    @property
    def verdict(self) -> str:
        if self.p >= SURE:
            return "may be chance"
        return "the first is better" if self.difference < 0 else "the second is better"


def compare(
    first: str, second: str, output: str | None = None, common: bool = False, seed: int = 0
) -> list[Compared]:
    """Compare the word error rates of two recognisers on the same utterances, by matched pairs.

    Args:
        first: folder that decode or score wrote, its hypotheses.jsonl, or SLAM-LLM's `…_pred` with its `…_gt` beside it.
        second: the same of the other one.
        output: a JSON file for the numbers.
        common: compare the utterances that both hold, where one holds others too; those are counted and named.
        seed: of resampling and exchanges.

    Returns:
        One comparison a test subset that both know, and one of all.

    Raises:
        UserError: utterances that only one of them holds, or whose references differ.
    """
    ours, theirs = (read_output(place, HYPOTHESES) for place in (first, second))
    pairs, lacking = _paired((first, ours), (second, theirs), common)
    rows = _by_subset(pairs, first, seed)
    _print(rows, first, second, lacking)
    if output:
        write_json(
            output,
            {
                "first": first,
                "second": second,
                "unit": "percent",
                "left_out": lacking,
                "compared": [asdict(row) for row in rows],
            },
        )
    return rows


def compare_outputs(
    first: tuple[str, Sequence[Hypothesis]], second: tuple[str, Sequence[Hypothesis]], seed: int = 0
) -> list[Compared]:
    """The same of what is read already, with the name of each.

    Raises:
        UserError: as for `compare`.
    """
    return _by_subset(_paired(first, second, common=False)[0], first[0], seed)


def _by_subset(pairs: Sequence[tuple[Hypothesis, Hypothesis]], first: str, seed: int) -> list[Compared]:
    a, b = (measure([pair[side] for pair in pairs]) for side in (0, 1))
    if not a.words.sum():
        raise UserError(
            f"The references of the {len(pairs)} utterances of {first} hold no words, so there is no rate to compare."
        )
    subsets = groups_of(a.rows, lambda row: row.subset)
    chosen = (
        {name: numbers for name, numbers in subsets.items() if name and a.words[numbers].sum()}
        if len(subsets) > 1
        else {}
    )
    return [
        _compared(name, a, b, numbers, seed)
        for name, numbers in [*chosen.items(), (ALL, np.arange(len(pairs)))]
    ]


def _paired(
    first: tuple[str, Sequence[Hypothesis]], second: tuple[str, Sequence[Hypothesis]], common: bool
) -> tuple[list[tuple[Hypothesis, Hypothesis]], dict[str, int]]:
    """The utterances of both, and how many only one of them holds."""
    # SLAM-LLM's files do not know subsets, so keys alone must do where one side has none.
    known = all(row.subset for _, rows in (first, second) for row in rows)
    sides = [(place, _by_name(place, rows, known)) for place, rows in (first, second)]
    lacking = {}
    for (place, rows), (other, others) in (sides, sides[::-1]):
        lonely = sorted(rows.keys() - others.keys())
        if lonely and (not common or len(lonely) == len(rows)):
            raise UserError(
                f"{place} holds {len(lonely)} utterances that {other} lacks, first {lonely[0][0]}: compare outputs for the same test set"
                + ("." if common else ", or add --common true to compare what both hold.")
            )
        lacking[place] = len(lonely)
    pairs = [(row, sides[1][1][name]) for name, row in sides[0][1].items() if name in sides[1][1]]
    differing = [a.key for a, b in pairs if normalise(a.reference) != normalise(b.reference)]
    if differing:
        raise UserError(
            f"{first[0]} and {second[0]} have other references for {len(differing)} of {len(pairs)} utterances, first {differing[0]}: their rates cannot be "
            "compared; decode both with manifests of one data.text."
        )
    return pairs, lacking


def _by_name(place: str, rows: Sequence[Hypothesis], with_subset: bool) -> dict[tuple[str, str], Hypothesis]:
    named = {(row.key, row.subset if with_subset else ""): row for row in rows}
    if len(named) < len(rows):
        raise UserError(
            f"{place} names {len(rows) - len(named)} utterances more than once: each may stand there once."
        )
    return named


def _compared(name: str, a: Measured, b: Measured, chosen: np.ndarray, seed: int) -> Compared:
    found = matched_pairs(a.errors[chosen], b.errors[chosen], a.words[chosen], seed)
    points = [round(100 * value, 2) for value in (found.difference, found.low, found.high)]
    rates = [percent(m.total(chosen)) or 0.0 for m in (a, b)]
    return Compared(name, len(chosen), *rates, *points, p=round(found.p, 5), differing=found.differing)


def _print(rows: Sequence[Compared], first: str, second: str, lacking: dict[str, int]) -> None:
    log_line(f"first:  {first}")
    log_line(f"second: {second}")
    for place, count in lacking.items():
        if count:
            log_line(f"left out: {count} utterances that only {place} holds")
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
    """`0.0004` → `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
