"""What a test shows beyond its word error rate: confidence, rates by speaker and length, typical errors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from slam_asr.scoring.guards import GUARDS, guards_of
from slam_asr.scoring.metrics import Measured, character_errors, groups_of, measure
from slam_asr.scoring.normalization import whisper_normaliser
from slam_asr.scoring.statistics import interval, interval_over
from slam_asr.scoring.wer import Hypothesis, WordErrors

DURATIONS = (5, 10, 15, 20, 30)
"""Upper limits, in seconds, of the groups of utterances by length."""
CONFUSIONS = 30
"""Maximum number of confusions listed, of each kind."""
NORMALISED = "whisper"


def analyse(measured: Measured) -> dict[str, Any]:
    """Compute all numbers of a test. Rates are in percent, or None if there are no words to count.

    Returns:
        `all` and `subsets` (by name): counts, hours, `wer`, its 95 % `interval` over utterances and
        `speaker_interval`, `cer`, and `normalised`, the rate after Whisper's normaliser;
        `durations` and `speakers`: counts of each group;
        `confusions`: the most frequent substitutions, deletions and insertions;
        `guards`: number of utterances that each guard flags;
        `empty_references`: number of utterances without speech, and the words written for them.
    """
    rows = measured.rows
    characters = character_errors(rows)
    normalised = measure(normalised_rows(rows))
    subsets = groups_of(rows, lambda row: row.subset)
    all_indices = np.arange(len(rows))

    def numbers(indices: np.ndarray) -> dict[str, Any]:
        wrong, total = (int(n) for n in characters[indices].sum(0))
        return counts_of(measured, indices) | {
            "interval": _percents(interval(measured.errors[indices], measured.words[indices])),
            "speaker_interval": _speaker_interval(measured, indices),
            "cer": round(100 * wrong / total, 2) if total else None,
            "normalised": percent(normalised.total(indices)),
        }

    overall = numbers(all_indices)
    return {
        "all": overall,
        "subsets": {
            name: overall if len(subsets) == 1 else numbers(indices) for name, indices in subsets.items()
        },
        "durations": _by_duration(measured),
        "speakers": {
            name: counts_of(measured, indices)
            for name, indices in groups_of(rows, lambda row: row.speaker).items()
            if name
        },
        "confusions": {
            "substitutions": [[*pair, n] for pair, n in _most_frequent(measured.substituted)],
            "deletions": [[word, n] for word, n in _most_frequent(measured.deleted)],
            "insertions": [[word, n] for word, n in _most_frequent(measured.inserted)],
        },
        "guards": _guards(rows),
        "empty_references": _empty_references(measured),
    }


def counts_of(measured: Measured, indices: np.ndarray | None = None) -> dict[str, Any]:
    """The word errors of a group of utterances, its hours and its rate in percent; of all without indices."""
    errors = measured.total(indices)
    rows = measured.rows if indices is None else [measured.rows[i] for i in indices]
    return asdict(errors) | {
        "errors": errors.errors,
        "hours": round(sum(r.duration for r in rows) / 3600, 4),
        "wer": percent(errors),
    }


def percent(errors: WordErrors) -> float | None:
    """The word error rate in percent, to two decimals, or None without reference words."""
    return round(100 * errors.wer, 2) if errors.words else None


def normalised_rows(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The utterances with both texts after Whisper's normaliser for English."""
    normalise = whisper_normaliser()
    return [
        replace(row, reference=normalise(row.reference), hypothesis=normalise(row.hypothesis)) for row in rows
    ]


def _percents(ends: tuple[float, float] | None) -> list[float] | None:
    return [round(100 * end, 2) for end in ends] if ends else None


def _speaker_interval(measured: Measured, indices: np.ndarray) -> list[float] | None:
    """The 95 % interval over speakers, or None unless all speakers are known."""
    speakers = groups_of((measured.rows[i] for i in indices), lambda row: row.speaker)
    if "" in speakers:
        return None
    return _percents(interval_over(speakers, measured.errors[indices], measured.words[indices]))


def _by_duration(measured: Measured) -> list[dict[str, Any]]:
    """Counts of utterances grouped by length in seconds; those of unknown length are in no group."""
    seconds = np.array([row.duration for row in measured.rows])
    groups = []
    for low, high in zip((0, *DURATIONS), (*DURATIONS, None), strict=True):
        indices = np.flatnonzero((seconds > low) & (seconds <= (high or np.inf)))
        if len(indices):
            groups.append({"from": low, "to": high} | counts_of(measured, indices))
    return groups


def _most_frequent(counter: Counter[Any]) -> list[tuple[Any, int]]:
    """The most frequent entries with their counts; equally frequent ones by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]


def _guards(rows: Sequence[Hypothesis]) -> dict[str, int]:
    counted = Counter(guard for row in rows for guard in guards_of(row))
    return {guard: counted[guard] for guard in GUARDS}


def _empty_references(measured: Measured) -> dict[str, int]:
    silent = measured.words == 0
    return {"utterances": int(silent.sum()), "insertions": int(measured.errors[silent].sum())}
