"""How much there is of what: the numbers of a corpus by split and by subset, counted as utterances pass."""

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from slam_asr.audio import SAMPLE_RATE
from slam_asr.corpora import Rejection
from slam_asr.manifest import Utterance

BIN_SECONDS = 1
"""Width of a bar of the histogram of durations; the first one holds what is shorter than that."""
EXAMPLES = 5
"""Rejections of each reason that are kept in full."""


class Measures:
    """Counts over a set of utterances; all sums are of whole numbers, so their order does not matter."""

    def __init__(self) -> None:
        self.utterances = self.samples = self.words = self.characters = 0
        self.shortest, self.longest = 0, 0
        self._speakers: set[int] = set()
        """Hashes: names may be long."""
        self._bins: Counter[int] = Counter()

    def add(self, utterance: Utterance) -> None:
        samples = round(utterance.duration * SAMPLE_RATE)
        self.shortest = min(self.shortest, samples) if self.utterances else samples
        self.longest = max(self.longest, samples)
        self.utterances += 1
        self.samples += samples
        self.words += len(utterance.target.split())
        self.characters += len(utterance.target)
        self._bins[samples // (BIN_SECONDS * SAMPLE_RATE)] += 1
        if utterance.speaker:
            self._speakers.add(hash(utterance.speaker))

    def as_dict(self) -> dict[str, Any]:
        """Hours, durations in seconds, counts, and the histogram: utterances of [0, 1) s, [1, 2) s and so on."""
        seconds = self.samples / SAMPLE_RATE
        return {
            "utterances": self.utterances,
            "hours": round(seconds / 3600, 6),
            "mean_duration": round(seconds / self.utterances, 4),
            "min_duration": round(self.shortest / SAMPLE_RATE, 4),
            "max_duration": round(self.longest / SAMPLE_RATE, 4),
            "words": self.words,
            "characters": self.characters,
            "speakers": len(self._speakers),
            "durations": [self._bins[second] for second in range(max(self._bins) + 1)],
        }


class CorpusStatistics:
    """The numbers of a corpus while its manifests are written."""

    def __init__(self) -> None:
        self._splits: dict[str, Measures] = {}
        self._subsets: defaultdict[str, dict[str, Measures]] = defaultdict(dict)
        self._alphabet: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self.resampled = self.mixed = 0
        """Utterances whose files have another sample rate than 16 kHz, and more channels than one."""

    def add(self, split: str, utterance: Utterance) -> None:
        """Count an utterance of a manifest."""
        self._splits.setdefault(split, Measures()).add(utterance)
        self._subsets[split].setdefault(utterance.subset, Measures()).add(utterance)
        self._alphabet.update(utterance.target)

    def set_aside(self, rejection: Rejection) -> None:
        """Count an utterance of no manifest; the first of each reason are kept as examples."""
        self._reasons[rejection.reason] += 1
        if len(self._examples[rejection.reason]) < EXAMPLES:
            self._examples[rejection.reason].append(asdict(rejection))

    @property
    def rejected(self) -> int:
        return self._reasons.total()

    def utterances(self, split: str) -> int:
        return self._splits[split].utterances if split in self._splits else 0

    def reasons(self) -> list[tuple[str, int]]:
        """Reasons and how many were set aside for each, the most frequent first."""
        return self._reasons.most_common()

    def as_dict(self, held_out: bool) -> dict[str, Any]:
        """All of it, JSON-able.

        Args:
            held_out: whether dev was taken out of train.
        """
        return {
            "splits": {
                split: measures.as_dict()
                | {"subsets": {name: m.as_dict() for name, m in sorted(self._subsets[split].items())}}
                for split, measures in self._splits.items()
            },
            "dev_held_out_of_train": held_out,
            "rejected": {"total": self.rejected, "by_reason": dict(sorted(self._reasons.items()))},
            "examples": {reason: self._examples[reason] for reason in sorted(self._examples)},
            "converted": {"to_16_khz": self.resampled, "to_mono": self.mixed},
            "alphabet": dict(sorted(self._alphabet.items(), key=lambda pair: (-pair[1], pair[0]))),
        }
