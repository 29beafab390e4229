"""What a test says beside its word error rate: how sure it is, for whom and for which audio it holds, and what goes wrong."""

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
"""Seconds at which the groups of audio by length end."""
CONFUSIONS = 30
"""Most frequent ones that are named, of each kind."""
NORMALISED = "whisper"


def analyse(measured: Measured) -> dict[str, Any]:
    """All numbers of a test. Rates are in percent; None where there are no words to count.

    Returns:
        `all` and `subsets` (by name): counts, hours, `wer`, its 95 % `interval` over utterances and `speaker_interval`, `cer`, and
        `normalised`, the rate after Whisper's normaliser; `durations` and `speakers`: counts of each group;
        `confusions`: the most frequent substitutions, deletions and insertions; `guards`: utterances under each;
        `empty_references`: utterances in which nothing was said, and the words written there.
    """
    rows = measured.rows
    characters = character_errors(rows)
    normalised = measure(normalised_rows(rows))
    subsets = groups_of(rows, lambda row: row.subset)
    everything = np.arange(len(rows))

    def numbers(chosen: np.ndarray) -> dict[str, Any]:
        wrong, of = (int(n) for n in characters[chosen].sum(0))
        return counts_of(measured, chosen) | {
            "interval": _percents(interval(measured.errors[chosen], measured.words[chosen])),
            "speaker_interval": _speaker_interval(measured, chosen),
            "cer": round(100 * wrong / of, 2) if of else None,
            "normalised": percent(normalised.total(chosen)),
        }

    whole = numbers(everything)
    return {
        "all": whole,
        "subsets": {
            name: whole if len(subsets) == 1 else numbers(chosen) for name, chosen in subsets.items()
        },
        "durations": _by_duration(measured),
        "speakers": {
            name: counts_of(measured, chosen)
            for name, chosen in groups_of(rows, lambda row: row.speaker).items()
            if name
        },
        "confusions": {
            "substitutions": [[*pair, n] for pair, n in _most(measured.substituted)],
            "deletions": [[word, n] for word, n in _most(measured.deleted)],
            "insertions": [[word, n] for word, n in _most(measured.inserted)],
        },
        "guards": _guards(rows),
        "empty_references": _empty_references(measured),
    }


def counts_of(measured: Measured, chosen: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    """The word errors of a group, its hours and its rate."""
    errors = measured.total(chosen)
    rows = measured.rows if isinstance(chosen, slice) else [measured.rows[i] for i in chosen]
    return asdict(errors) | {
        "errors": errors.errors,
        "hours": round(sum(r.duration for r in rows) / 3600, 4),
        "wer": percent(errors),
    }


def percent(errors: WordErrors) -> float | None:
    """The rate in percent, to two decimals."""
    return round(100 * errors.wer, 2) if errors.words else None


def normalised_rows(rows: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The utterances as Whisper's normaliser for English writes them."""
    written = whisper_normaliser()
    return [
        replace(row, reference=written(row.reference), hypothesis=written(row.hypothesis)) for row in rows
    ]


def _percents(ends: tuple[float, float] | None) -> list[float] | None:
    return [round(100 * end, 2) for end in ends] if ends else None


def _speaker_interval(measured: Measured, chosen: np.ndarray) -> list[float] | None:
    """None unless all speakers are known."""
    speakers = groups_of((measured.rows[i] for i in chosen), lambda row: row.speaker)
    if "" in speakers:
        return None
    return _percents(interval_over(speakers, measured.errors[chosen], measured.words[chosen]))


def _by_duration(measured: Measured) -> list[dict[str, Any]]:
    """Groups of audio by length, in seconds; what has no known duration is in none."""
    seconds = np.array([row.duration for row in measured.rows])
    groups = []
    for low, high in zip((0, *DURATIONS), (*DURATIONS, None), strict=True):
        chosen = np.flatnonzero((seconds > low) & (seconds <= (high or np.inf)))
        if len(chosen):
            groups.append({"from": low, "to": high} | counts_of(measured, chosen))
    return groups


def _most(counter: Counter) -> list[tuple[Any, int]]:
    """The most frequent; of equally frequent ones the first by name."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]


def _guards(rows: Sequence[Hypothesis]) -> dict[str, int]:
    counted = Counter(guard for row in rows for guard in guards_of(row))
    return {guard: counted[guard] for guard in GUARDS}


def _empty_references(measured: Measured) -> dict[str, int]:
    silent = measured.words == 0
    return {"utterances": int(silent.sum()), "insertions": int(measured.errors[silent].sum())}
