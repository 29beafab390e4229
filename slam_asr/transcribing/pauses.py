"""Where a recording can be divided: at its longest and quietest pauses.

An encoder hears half a minute at most, and a model is at its best on lengths it was trained on. Loudness is
measured every 10 ms and smoothed over 300 ms, so that a pause between sentences counts for more than the
closure of a consonant.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slam_asr.audio import SAMPLE_RATE

HOP = SAMPLE_RATE // 100
"""Samples between two measurements of loudness."""
SMOOTHING = 30
"""Measurements that one pause is looked for over."""
FLOOR = 1e-4
"""Root mean square below which nothing is heard, at full scale 1: -80 dB."""
QUIET = 0.05
"""Of a recording's loud parts (its 95th percentile): what is quieter belongs to no one's speech; -26 dB."""
MARGIN = 0.2
"""Seconds of quiet that are kept on both sides of speech."""


@dataclass(frozen=True)
class Stretch:
    """A part of a recording."""

    start: int
    """Its first sample, at 16 kHz."""
    end: int
    """The sample behind its last one."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Start and end."""
        return self.start / SAMPLE_RATE, self.end / SAMPLE_RATE


def divide(samples: np.ndarray, longest: float) -> list[Stretch]:
    """Divide a recording at pauses into parts that can be heard at once; quiet at both ends of a part is left out.

    Args:
        samples: [samples] at 16 kHz, full scale 1.
        longest: seconds of a part at most.

    Returns:
        Parts in order, none overlapping; none at all where nothing is heard.
    """
    loudness = _loudness(samples)
    if len(loudness) == 0 or loudness.max() < FLOOR:
        return []
    quiet = max(FLOOR, QUIET * float(np.percentile(loudness, 95)))
    smooth = np.convolve(loudness, np.ones(SMOOTHING) / SMOOTHING, mode="same")
    parts = []
    for first, last in _cuts(smooth, max(2, round(longest * SAMPLE_RATE) // HOP), quiet):
        heard = np.flatnonzero(loudness[first:last] > quiet)
        if len(heard):
            margin = round(MARGIN * SAMPLE_RATE)
            start = max(first * HOP, (first + int(heard[0])) * HOP - margin)
            end = min(last * HOP, (first + int(heard[-1]) + 1) * HOP + margin, len(samples))
            parts.append(Stretch(start, end))
    return parts


def _cuts(smooth: np.ndarray, longest: int, quiet: float) -> Iterator[tuple[int, int]]:
    """(first, last) of parts of at most `longest` measurements, divided where it is quietest."""
    first = 0
    while len(smooth) - first > longest:
        # In the second half, since parts that are too short give the LLM little to go by; where nobody pauses there, before it;
        # and where nobody pauses at all, within a word.
        late, early = (first + longest // 2, first + longest), (first + longest // 10, first + longest // 2)
        start, end = next(
            (span for span in (late, early) if smooth[slice(*span)].min(initial=np.inf) <= quiet), late
        )
        last = start + int(np.argmin(smooth[start:end])) + 1
        yield first, last
        first = last
    yield first, len(smooth)


def _loudness(samples: np.ndarray) -> np.ndarray:
    """Root mean square of every `HOP` samples; the last, shorter ones count as well."""
    padded = np.pad(samples.astype(np.float32), (0, -len(samples) % HOP))
    return np.sqrt((padded.reshape(-1, HOP) ** 2).mean(axis=1))
