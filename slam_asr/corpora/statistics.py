"""Statistics of a corpus by split and subset, collected while its manifests are written."""

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from slam_asr.artifacts.manifest import Utterance
from slam_asr.audio import SAMPLE_RATE
from slam_asr.corpora import Rejection

BIN_SECONDS = 1
"""Width in seconds of the bins in the histogram of durations. The first bin begins at 0."""
MAX_EXAMPLES = 5
"""Maximum number of rejections per reason that are saved as examples."""


class Measures:
    """Counts over a set of utterances. All are integers, so they do not depend on the utterances' order."""

    def __init__(self) -> None:
        self.utterances = self.samples = self.words = self.characters = 0
        self.shortest, self.longest = 0, 0
        """Durations in samples at 16 kHz."""
        self._speakers: set[int] = set()
        """Hashes of the speakers' names, because names may be long."""
        self._bins: Counter[int] = Counter()

    def add(self, utterance: Utterance) -> None:
        assert utterance.duration is not None, "build-manifest measures every utterance"
        samples = round(utterance.duration * SAMPLE_RATE)
        self.shortest = min(self.shortest, samples) if self.utterances else samples
        self.longest = max(self.longest, samples)
        self.utterances += 1
        self.samples += samples
        self.words += len(utterance.target.split())
        self.characters += len(utterance.target)
        # Computed from the number of samples, so that an utterance of exactly 2 s is in [2, 3) s, however its
        # duration is rounded as a float.
        self._bins[samples // (BIN_SECONDS * SAMPLE_RATE)] += 1
        if utterance.speaker:
            # Two of ten thousand speakers have the same hash of 64 bits with a probability of about 3e-12.
            self._speakers.add(hash(utterance.speaker))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the hours of audio, and the mean and extreme durations in seconds.

        `durations` is a histogram: the numbers of utterances that last [0, 1) s, [1, 2) s and so on.
        """
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
    """The statistics of a corpus, updated with each utterance and each rejection."""

    def __init__(self) -> None:
        self._splits: dict[str, Measures] = {}
        self._subsets: defaultdict[str, dict[str, Measures]] = defaultdict(dict)
        self._alphabet: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self.resampled = self.downmixed = 0
        """Number of utterances with a sample rate other than 16 kHz; number of utterances whose channels are
        averaged."""

    def add(self, split: str, utterance: Utterance) -> None:
        """Count an utterance of a manifest."""
        self._splits.setdefault(split, Measures()).add(utterance)
        self._subsets[split].setdefault(utterance.subset, Measures()).add(utterance)
        self._alphabet.update(utterance.target)

    def add_rejection(self, rejection: Rejection) -> None:
        """Count a rejection; the first few of each reason are saved as examples."""
        self._reasons[rejection.reason] += 1
        if len(self._examples[rejection.reason]) < MAX_EXAMPLES:
            self._examples[rejection.reason].append(asdict(rejection))

    def reasons(self) -> str:
        """Return the number of rejections for each reason, the most frequent first, as text."""
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())

    def as_dict(self, held_out: bool) -> dict[str, Any]:
        """Return all statistics in a form that can be written as JSON.

        Args:
            held_out: whether dev consists of utterances held out of train.
        """
        return {
            "splits": {
                split: measures.as_dict()
                | {"subsets": {name: m.as_dict() for name, m in sorted(self._subsets[split].items())}}
                for split, measures in self._splits.items()
            },
            "dev_held_out_of_train": held_out,
            "rejected": {"total": self._reasons.total(), "by_reason": dict(sorted(self._reasons.items()))},
            "examples": {reason: self._examples[reason] for reason in sorted(self._examples)},
            "converted": {"to_16_khz": self.resampled, "to_mono": self.downmixed},
            # Characters with equal counts are in the order of code points, so that the same corpus always
            # gives the same statistics.json and statistics.html.
            "alphabet": dict(sorted(self._alphabet.items(), key=lambda pair: (-pair[1], pair[0]))),
        }
