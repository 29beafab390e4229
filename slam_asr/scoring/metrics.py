"""The errors of each utterance, so that any group of them can be counted, and what was taken for what.

Every utterance is aligned once (jiwer); totals, groups, intervals and comparisons are sums over what that gave.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

from slam_asr.scoring.wer import Hypothesis, WordErrors, normalise

HITS, SUBSTITUTIONS, DELETIONS, INSERTIONS = range(4)
_AT_ONCE = 5000
"""Utterances whose alignments are held at the same time."""


@dataclass
class Measured:
    """Utterances and their errors, in one order."""

    rows: Sequence[Hypothesis]
    counts: np.ndarray
    """[utterances, 4]: words that are hits, substitutions, deletions, insertions."""
    substituted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a spoken word was written as another."""
    deleted: Counter[str] = field(default_factory=Counter)
    inserted: Counter[str] = field(default_factory=Counter)

    @property
    def words(self) -> np.ndarray:
        """[utterances]: words in the references."""
        return self.counts[:, :INSERTIONS].sum(1)

    @property
    def errors(self) -> np.ndarray:
        """[utterances]: words that are wrong."""
        return self.counts[:, SUBSTITUTIONS:].sum(1)

    def total(self, chosen: np.ndarray | slice = slice(None)) -> WordErrors:
        """The word errors of all utterances together, or of those chosen by number."""
        counts = self.counts[chosen]
        hits, substitutions, deletions, insertions = (int(n) for n in counts.sum(0))
        return WordErrors(
            len(counts), hits + substitutions + deletions, hits, substitutions, deletions, insertions
        )


def measure(rows: Sequence[Hypothesis]) -> Measured:
    """Align every utterance."""
    measured = Measured(rows, np.zeros((len(rows), 4), dtype=np.int64))
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        output = jiwer.process_words(
            [normalise(r.reference) for r in some], [normalise(r.hypothesis) for r in some]
        )
        for at, (chunks, spoken, written) in enumerate(
            zip(output.alignments, output.references, output.hypotheses, strict=True), start=start
        ):
            for chunk in chunks:
                _count(measured, at, chunk, spoken, written)
    return measured


def score(rows: Sequence[Hypothesis]) -> WordErrors:
    """The word errors of all utterances together."""
    return measure(rows).total()


def _count(
    measured: Measured, at: int, chunk: jiwer.AlignmentChunk, spoken: list[str], written: list[str]
) -> None:
    theirs, ours = (
        spoken[chunk.ref_start_idx : chunk.ref_end_idx],
        written[chunk.hyp_start_idx : chunk.hyp_end_idx],
    )
    if chunk.type == "equal":
        measured.counts[at, HITS] += len(theirs)
    elif chunk.type == "substitute":
        measured.counts[at, SUBSTITUTIONS] += len(theirs)
        measured.substituted.update(zip(theirs, ours, strict=True))
    elif chunk.type == "delete":
        measured.counts[at, DELETIONS] += len(theirs)
        measured.deleted.update(theirs)
    else:
        measured.counts[at, INSERTIONS] += len(ours)
        measured.inserted.update(ours)


def nothing_written(measured: Measured) -> Measured:
    """The same references for a recogniser that never writes a word: all deletions, and nothing to align."""
    counts = np.zeros_like(measured.counts)
    counts[:, DELETIONS] = measured.words
    return Measured(measured.rows, counts)


def character_errors(rows: Sequence[Hypothesis]) -> np.ndarray:
    """[utterances, 2]: characters that are wrong, and characters of the reference; spaces between words count, as in jiwer's CER."""
    pairs = ((normalise(r.reference), normalise(r.hypothesis)) for r in rows)
    return np.array(
        [(Levenshtein.distance(spoken, written), len(spoken)) for spoken, written in pairs], dtype=np.int64
    ).reshape(-1, 2)


def groups_of(rows: Iterable[Hypothesis], key: Callable[[Hypothesis], str]) -> dict[str, np.ndarray]:
    """Numbers of the utterances of each group, sorted by the group's name."""
    groups: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(key(row), []).append(at)
    return {name: np.array(groups[name]) for name in sorted(groups)}
