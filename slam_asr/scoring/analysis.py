"""Analyses results on a test set: rates by subset, length and speaker, their uncertainty, typical errors."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from slam_asr.artifacts.hypotheses import Hypothesis, WordErrors, scored_text
from slam_asr.artifacts.word_errors import Measured, character_errors, groups_of, measure
from slam_asr.artifacts.writing_systems import comparable
from slam_asr.scoring.normalization import normalisers_of
from slam_asr.scoring.statistics import interval, interval_over

DURATIONS = (5, 10, 15, 20, 30)
"""Upper limits in seconds, inclusive, of the groups by length of audio. A last group has no upper limit."""
MAX_CONFUSIONS = 30
"""Maximum number of substitutions, of deletions and of insertions that are listed."""

LOOP, CUT, EMPTY, REFUSAL = "loop", "cut at the limit", "empty answer", "refusal"
ANSWER_FAULTS = {
    LOOP: "The same words four or more times in a row, although the reference has no repetition.",
    CUT: "The answer reached decoding.max_new_tokens.",
    EMPTY: "No text, although the reference has words.",
    REFUSAL: "An assistant's apology instead of a transcript.",
}
"""Faults that an answer can have, each with the explanation that the report shows."""

# One to eight words, followed by the same words at least three more times.
_LOOP = re.compile(r"(?<!\S)(\S+(?: \S+){0,7}?)(?: \1){3,}(?!\S)")
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am|we are) (?:so |very |really )?(?:sorry|unable|not able)\b|"
    r"(?:i|we) (?:can(?:no|')?t|can not|could(?:n'?t| not)) "
    r"(?:assist|help|transcribe|provide|process|access|hear|understand)\b|"
    r"(?:sorry|unfortunately|apologies),? (?:but )?i\b|as an? (?:ai|artificial)\b)|"
    r"\b(?:ai|large|as a) language model\b"
)


def analyse(measured: Measured) -> dict[str, Any]:
    """Compute all numbers of a test set. Rates are in percent, or None if the references have no words.

    Args:
        measured: the utterances of the test set, aligned.

    Returns:
        `unit`: what the rates count, `words` or `characters`;
        `all` and `subsets` (by name): counts, hours, the `rate` in this unit, its 95 % `interval` over
        utterances, the `speaker_interval` over speakers, `wer` (None if characters are counted), `cer`, and
        `normalised`, the rate after normalisation;
        `durations` and `speakers`: counts, hours and `rate` of each group;
        `confusions`: the most frequent substitutions, deletions and insertions;
        `faults`: number of utterances with each of the `ANSWER_FAULTS`;
        `empty_references`: `utterances`, the number with an empty reference, and `insertions`, the number of
        words (or characters) in their hypotheses.
    """
    rows = measured.rows
    characters = character_errors(rows, measured.characters)
    normalised = measure(normalised_rows(rows), measured.characters)
    subsets = groups_of(rows, lambda row: row.subset)
    speakers = groups_of(rows, lambda row: row.speaker)
    faults = Counter(fault for row in rows for fault in faults_of(row, measured.characters))
    silent = measured.words == 0
    insertions = int(measured.errors[silent].sum())

    def numbers(indices: np.ndarray) -> dict[str, Any]:
        wrong, total = (int(n) for n in characters[indices].sum(0))
        return counts_of(measured, indices) | {
            "interval": _percents(interval(measured.errors[indices], measured.words[indices])),
            "speaker_interval": _speaker_interval(measured, indices),
            "cer": round(100 * wrong / total, 2) if total else None,
            "normalised": percent(normalised.total(indices)),
        }

    overall = numbers(np.arange(len(rows)))
    return {
        "unit": measured.unit,
        "all": overall,
        "subsets": {
            name: overall if len(subsets) == 1 else numbers(indices) for name, indices in subsets.items()
        },
        "durations": _by_duration(measured),
        "speakers": {name: counts_of(measured, indices) for name, indices in speakers.items() if name},
        "confusions": {
            "substitutions": [[*pair, n] for pair, n in _most_frequent(measured.substituted)],
            "deletions": [[word, n] for word, n in _most_frequent(measured.deleted)],
            "insertions": [[word, n] for word, n in _most_frequent(measured.inserted)],
        },
        "faults": {fault: faults[fault] for fault in ANSWER_FAULTS},
        "empty_references": {"utterances": int(silent.sum()), "insertions": insertions},
    }


def counts_of(measured: Measured, indices: np.ndarray | None = None) -> dict[str, Any]:
    """Sum the word errors and hours of a group of utterances, and compute its rate.

    Args:
        measured: all utterances.
        indices: int [n], those of the group; all utterances if not given.

    Returns:
        The fields of `WordErrors`; `errors`; `hours`; `rate` in percent; and `wer`, which equals `rate` or,
        if characters are counted, is None.
    """
    errors = measured.total(indices)
    rows = measured.rows if indices is None else [measured.rows[i] for i in indices]
    return asdict(errors) | {
        "errors": errors.errors,
        "hours": round(sum(r.duration for r in rows) / 3600, 4),
        "rate": percent(errors),
        "wer": None if measured.characters else percent(errors),
    }


def percent(errors: WordErrors) -> float | None:
    """The word or character error rate in percent, to two decimals; None if the references are empty."""
    return round(100 * errors.wer, 2) if errors.words else None


def normalised_rows(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The utterances, with both of their texts normalised for their language."""
    return [
        replace(row, reference=normalise(row.reference), hypothesis=normalise(row.hypothesis))
        for row, normalise in zip(rows, normalisers_of(rows), strict=True)
    ]


def _percents(ends: tuple[float, float] | None) -> list[float] | None:
    return [round(100 * end, 2) for end in ends] if ends else None


def _speaker_interval(measured: Measured, indices: np.ndarray) -> list[float] | None:
    """The 95 % interval over speakers in percent; None if any speaker is unknown."""
    speakers = groups_of((measured.rows[i] for i in indices), lambda row: row.speaker)
    # Utterances of unknown speakers may come from one person or from many.
    if "" in speakers:
        return None
    return _percents(interval_over(speakers, measured.errors[indices], measured.words[indices]))


def _by_duration(measured: Measured) -> list[dict[str, Any]]:
    """Counts of the utterances in each group by length. Utterances of unknown length are in no group."""
    seconds = np.array([row.duration for row in measured.rows])
    groups = []
    # A length of 0 means that it is unknown. No group includes 0, because the first one begins above it.
    for low, high in zip((0, *DURATIONS), (*DURATIONS, None), strict=True):
        indices = np.flatnonzero((seconds > low) & (seconds <= (high or np.inf)))
        if len(indices):
            groups.append({"from": low, "to": high} | counts_of(measured, indices))
    return groups


def _most_frequent(counter: Counter[Any]) -> list[tuple[Any, int]]:
    """The most frequent entries with their counts. Equally frequent entries are sorted by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]


def faults_of(row: Hypothesis, characters: bool = False) -> list[str]:
    """Return the `ANSWER_FAULTS` of an answer. A loop or refusal is no fault if the reference has one too.

    Args:
        row: the utterance.
        characters: whether characters are counted instead of words; a loop then repeats characters.
    """
    reference, hypothesis = comparable(row.reference).lower(), comparable(row.hypothesis).lower()
    found = {
        LOOP: loops(scored_text(hypothesis, characters)) and not loops(scored_text(reference, characters)),
        CUT: row.cut,
        EMPTY: reference and not hypothesis,
        REFUSAL: _REFUSAL.search(hypothesis) and not _REFUSAL.search(reference),
    }
    return [fault for fault, is_found in found.items() if is_found]


def loops(text: str) -> bool:
    """Whether the text repeats a sequence of up to eight words four or more times in a row."""
    # In a loop, some word occurs at least four times, so at least three words are repetitions. The search
    # takes quadratic time and is skipped if there are fewer.
    words = text.split()
    return len(words) - len(set(words)) >= 3 and _LOOP.search(text) is not None
