"""How much there is of what: the numbers of a corpus by split and by subset."""

import math
from collections import Counter
from typing import Any

from slam_asr.audio import SAMPLE_RATE
from slam_asr.corpora import Rejection
from slam_asr.corpora.checking import Checked


def corpus_statistics(splits: dict[str, list[Checked]], rejected: list[Rejection], held_out: bool) -> dict[str, Any]:
    """Counts, hours, durations in seconds, words and characters, what was set aside and what was converted."""
    every = [checked for split in splits.values() for checked in split]
    return {
        "splits": {
            split: _measure(checked)
            | {
                "subsets": {
                    name: _measure([c for c in checked if c.utterance.subset == name]) for name in _subsets(checked)
                }
            }
            for split, checked in splits.items()
        },
        "dev_held_out_of_train": held_out,
        "rejected": {
            "total": len(rejected),
            "by_reason": dict(sorted(Counter(r.reason for r in rejected).items())),
        },
        "converted": {
            "to_16_khz": sum(c.utterance.sample_rate != SAMPLE_RATE for c in every),
            "to_mono": sum(c.channels != 1 for c in every),
        },
    }


def _subsets(checked: list[Checked]) -> list[str]:
    return sorted({c.utterance.subset for c in checked})


def _measure(checked: list[Checked]) -> dict[str, float]:
    utterances = [c.utterance for c in checked]
    durations = [u.duration for u in utterances]
    return {
        "utterances": len(utterances),
        "hours": round(math.fsum(durations) / 3600, 6),
        "mean_duration": round(math.fsum(durations) / len(durations), 4),
        "min_duration": round(min(durations), 4),
        "max_duration": round(max(durations), 4),
        "words": sum(len(u.target.split()) for u in utterances),
        "characters": sum(len(u.target) for u in utterances),
        "speakers": len({u.speaker for u in utterances if u.speaker}),
    }
