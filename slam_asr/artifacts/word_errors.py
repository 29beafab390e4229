"""Word errors per utterance, from which the errors of any group are summed, and confusions between words.

Every utterance is aligned once (jiwer). Totals, groups, intervals and comparisons are sums over these counts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

from slam_asr.artifacts.hypotheses import Hypothesis, WordErrors, normalise

HITS, SUBSTITUTIONS, DELETIONS, INSERTIONS = range(4)
_AT_ONCE = 5000
"""Utterances aligned at once: their alignments are in memory at the same time."""


@dataclass
class Measured:
    """Utterances and their errors, in the same order."""

    rows: Sequence[Hypothesis]
    counts: np.ndarray
    """[utterances, 4]: numbers of hits, substitutions, deletions and insertions."""
    substituted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Counts of (spoken word, written word)."""
    deleted: Counter[str] = field(default_factory=Counter)
    inserted: Counter[str] = field(default_factory=Counter)

    @property
    def words(self) -> np.ndarray:
        """[utterances]: words in the references."""
        return self.counts[:, :INSERTIONS].sum(1)

    @property
    def errors(self) -> np.ndarray:
        """[utterances]: substitutions, deletions and insertions together."""
        return self.counts[:, SUBSTITUTIONS:].sum(1)

    def total(self, indices: np.ndarray | None = None) -> WordErrors:
        """The word errors of all utterances together, or of those with the given indices."""
        counts = self.counts if indices is None else self.counts[indices]
        hits, substitutions, deletions, insertions = (int(n) for n in counts.sum(0))
        return WordErrors(
            len(counts), hits + substitutions + deletions, hits, substitutions, deletions, insertions
        )


def measure(rows: Sequence[Hypothesis]) -> Measured:
    """Align every utterance."""
    measured = Measured(rows, np.zeros((len(rows), 4), dtype=np.int64))
    for start in range(0, len(rows), _AT_ONCE):
        batch = rows[start : start + _AT_ONCE]
        output = jiwer.process_words(
            [normalise(r.reference) for r in batch], [normalise(r.hypothesis) for r in batch]
        )
        for i, (chunks, spoken, written) in enumerate(
            zip(output.alignments, output.references, output.hypotheses, strict=True), start=start
        ):
            for chunk in chunks:
                _count(measured, i, chunk, spoken, written)
    return measured


def score(rows: Sequence[Hypothesis]) -> WordErrors:
    """The word errors of all utterances together."""
    return measure(rows).total()


def _count(
    measured: Measured, i: int, chunk: jiwer.AlignmentChunk, spoken: list[str], written: list[str]
) -> None:
    """Add one chunk of the alignment of utterance `i` to the counts."""
    reference = spoken[chunk.ref_start_idx : chunk.ref_end_idx]
    hypothesis = written[chunk.hyp_start_idx : chunk.hyp_end_idx]
    if chunk.type == "equal":
        measured.counts[i, HITS] += len(reference)
    elif chunk.type == "substitute":
        measured.counts[i, SUBSTITUTIONS] += len(reference)
        measured.substituted.update(zip(reference, hypothesis, strict=True))
    elif chunk.type == "delete":
        measured.counts[i, DELETIONS] += len(reference)
        measured.deleted.update(reference)
    else:
        measured.counts[i, INSERTIONS] += len(hypothesis)
        measured.inserted.update(hypothesis)


def nothing_written(measured: Measured) -> Measured:
    """The same references scored against empty hypotheses: all deletions, without an alignment."""
    counts = np.zeros_like(measured.counts)
    counts[:, DELETIONS] = measured.words
    return Measured(measured.rows, counts)


def character_errors(rows: Sequence[Hypothesis]) -> np.ndarray:
    """Character errors, and characters of the reference: [utterances, 2].

    Spaces between words count as characters, as in jiwer's CER.
    """
    pairs = ((normalise(r.reference), normalise(r.hypothesis)) for r in rows)
    return np.array(
        [(Levenshtein.distance(spoken, written), len(spoken)) for spoken, written in pairs], dtype=np.int64
    ).reshape(-1, 2)


def groups_of(rows: Iterable[Hypothesis], key: Callable[[Hypothesis], str]) -> dict[str, np.ndarray]:
    """Indices of the utterances of each group, sorted by the group's name."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return {name: np.array(groups[name]) for name in sorted(groups)}
