"""Counts of word errors per utterance, and of confusions between words.

If the references of a test set are in a script that does not separate words, such as Chinese, each character
counts as a word. The word error rate of such a measurement is the character error rate.

All word counts of an utterance come from a single alignment, by jiwer. Totals, groups of utterances,
confidence intervals and comparisons are all computed from sums of these counts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein

from slam_asr.artifacts.hypotheses import Hypothesis, WordErrors, align_all
from slam_asr.artifacts.writing_systems import characters_of, comparable, separates_words

HITS, SUBSTITUTIONS, DELETIONS, INSERTIONS = range(4)
_COLUMNS = {"equal": HITS, "substitute": SUBSTITUTIONS, "delete": DELETIONS, "insert": INSERTIONS}
_ROWS_PER_CALL = 5000
"""Maximum number of utterances that one call of jiwer aligns: all its alignments are in memory at once."""


@dataclass
class Measured:
    """Utterances and their errors, in the same order."""

    rows: Sequence[Hypothesis]
    counts: np.ndarray
    """int64 [utterances, 4]: numbers of hits, substitutions, deletions and insertions."""
    substituted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of substitutions for each pair (word of the reference, word of the hypothesis)."""
    deleted: Counter[str] = field(default_factory=Counter)
    """Number of deletions of each word."""
    inserted: Counter[str] = field(default_factory=Counter)
    """Number of insertions of each word."""
    characters: bool = False
    """Whether characters are counted instead of words."""

    @property
    def unit(self) -> str:
        """The unit of the counts: `"words"` or `"characters"`."""
        return "characters" if self.characters else "words"

    @property
    def words(self) -> np.ndarray:
        """int64 [utterances]: number of words in each reference."""
        # An alignment covers each word of the reference once: as a hit, a substitution or a deletion.
        return self.counts[:, :INSERTIONS].sum(1)

    @property
    def errors(self) -> np.ndarray:
        """int64 [utterances]: number of substitutions, deletions and insertions together."""
        return self.counts[:, SUBSTITUTIONS:].sum(1)

    def total(self, indices: np.ndarray | None = None) -> WordErrors:
        """Sum the word errors of all utterances, or of some.

        Args:
            indices: int [n], positions of the utterances to sum; all if not given. A position that is given
                twice counts twice.
        """
        counts = self.counts if indices is None else self.counts[indices]
        hits, substitutions, deletions, insertions = (int(n) for n in counts.sum(0))
        words = hits + substitutions + deletions
        return WordErrors(len(counts), words, hits, substitutions, deletions, insertions)


def measure(rows: Sequence[Hypothesis], characters: bool | None = None) -> Measured:
    """Align every utterance and count its word errors.

    Args:
        rows: the utterances.
        characters: count characters instead of words. If not given, the script of the references decides.
    """
    if characters is None:
        characters = not separates_words(row.reference for row in rows)
    measured = Measured(rows, np.zeros((len(rows), 4), dtype=np.int64), characters=characters)
    for start in range(0, len(rows), _ROWS_PER_CALL):
        batch = rows[start : start + _ROWS_PER_CALL]
        for i, stretches in enumerate(align_all(batch, characters), start=start):
            for stretch in stretches:
                _count(measured, i, *stretch)
    return measured


def _count(measured: Measured, i: int, kind: str, reference: list[str], hypothesis: list[str]) -> None:
    """Add one stretch of the alignment of utterance `i` to the counts."""
    # Only an insertion has no words of the reference. In a substitution, both sides have equally many.
    measured.counts[i, _COLUMNS[kind]] += len(reference or hypothesis)
    if kind == "substitute":
        measured.substituted.update(zip(reference, hypothesis, strict=True))
    elif kind == "delete":
        measured.deleted.update(reference)
    elif kind == "insert":
        measured.inserted.update(hypothesis)


def without_hypotheses(measured: Measured) -> Measured:
    """Score the same references against empty hypotheses, so that every word is a deletion.

    No alignment is needed. The counters of single words stay empty.
    """
    counts = np.zeros_like(measured.counts)
    # The rate is therefore 100 %. Any useful model stays below it.
    counts[:, DELETIONS] = measured.words
    return Measured(measured.rows, counts, characters=measured.characters)


def character_errors(rows: Sequence[Hypothesis], unspaced: bool = False) -> np.ndarray:
    """Count character errors. Spaces between words count as characters, as in jiwer's CER.

    Spaces next to a character of a script that does not separate words do not count.

    Args:
        rows: the utterances.
        unspaced: whether to count no spaces at all, because this test set does not separate words.

    Returns:
        int64 [utterances, 2]: number of errors, and number of characters in the reference.
    """

    def characters(text: str) -> str:
        return characters_of(comparable(text), unspaced)

    pairs = ((characters(r.reference), characters(r.hypothesis)) for r in rows)
    counts = [(Levenshtein.distance(reference, text), len(reference)) for reference, text in pairs]
    # The reshape gives the result two columns even if it has no rows.
    return np.array(counts, np.int64).reshape(-1, 2)


def groups_of(rows: Iterable[Hypothesis], key: Callable[[Hypothesis], str]) -> dict[str, np.ndarray]:
    """Divide utterances into groups.

    Args:
        rows: the utterances.
        key: returns the name of an utterance's group.

    Returns:
        For each group, sorted by name, the positions of its utterances: int64 [n], ascending.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return {name: np.array(groups[name]) for name in sorted(groups)}
