"""Divides a recording into segments, at its longest and quietest pauses.

An encoder such as Whisper's takes at most half a minute of audio, and a model is most accurate at the lengths
that it was trained on. Loudness is measured every 10 ms and smoothed over 300 ms, so that a pause between
sentences outweighs the closure of a consonant.
"""

from collections.abc import Iterator

import numpy as np

from slam_asr.audio import SAMPLE_RATE

HOP = SAMPLE_RATE // 100
"""Samples per measurement of loudness."""
SMOOTHING = 30
"""Number of measurements that are averaged in the search for a pause."""
SILENCE = 1e-4
"""Root mean square, at full scale 1, below which audio counts as silence: -80 dB."""
QUIET_RATIO = 0.05
"""Loudness below which audio is not speech, relative to the 95th percentile of all measurements: -26 dB."""
MARGIN_SECONDS = 0.2
"""Seconds of quiet audio that a segment retains before and after speech."""


def divide(samples: np.ndarray, longest: float) -> list[slice]:
    """Divide a recording at pauses, and remove quiet audio at both ends of each part.

    Args:
        samples: [samples] at 16 kHz, of any float type, full scale 1.
        longest: maximum length of a part, in seconds.

    Returns:
        The parts' samples, in order and without overlap; an empty list for silence.
    """
    loudness = _loudness(samples)
    if len(loudness) == 0 or loudness.max() < SILENCE:
        return []
    quiet = max(SILENCE, QUIET_RATIO * float(np.percentile(loudness, 95)))
    # Each smoothed value is the mean of the measurements around it, so the lowest value is in the middle of a
    # pause.
    smooth = np.convolve(loudness, np.ones(SMOOTHING) / SMOOTHING, mode="same")
    parts = []
    for first, last in _parts(smooth, max(2, round(longest * SAMPLE_RATE) // HOP), quiet):
        # The ends of speech are found in the unsmoothed loudness, because averaging would blur them.
        loud = np.flatnonzero(loudness[first:last] > quiet)
        if len(loud):
            margin = round(MARGIN_SECONDS * SAMPLE_RATE)
            start = max(first * HOP, (first + int(loud[0])) * HOP - margin)
            # The last measurement may include padding, so the end is limited to that of the recording.
            end = min(last * HOP, (first + int(loud[-1]) + 1) * HOP + margin, len(samples))
            parts.append(slice(start, end))
    return parts


def _parts(smooth: np.ndarray, longest: int, quiet: float) -> Iterator[tuple[int, int]]:
    """Yield parts of at most `longest` measurements as (first, end), divided where `smooth` is lowest.

    Args:
        smooth: float [measurements], the smoothed loudness.
        longest: maximum number of measurements in a part.
        quiet: loudness at or below which there is a pause.
    """
    first = 0
    while len(smooth) - first > longest:
        # A cut is preferred in the second half, because short parts give the LLM little context. If only the
        # first half has a pause, the cut is there, but not in the first tenth of the maximum length. Without
        # any such pause, the cut is in the second half, perhaps within a word.
        late, early = (first + longest // 2, first + longest), (first + longest // 10, first + longest // 2)
        start, end = next(
            (span for span in (late, early) if smooth[slice(*span)].min(initial=np.inf) <= quiet), late
        )
        last = start + int(np.argmin(smooth[start:end])) + 1
        yield first, last
        first = last
    yield first, len(smooth)


def _loudness(samples: np.ndarray) -> np.ndarray:
    """Return the root mean square of every `HOP` samples, float32 [measurements]; zeros pad the end.

    Args:
        samples: [samples] at 16 kHz, full scale 1.
    """
    padded = np.pad(samples.astype(np.float32), (0, -len(samples) % HOP))
    return np.sqrt((padded.reshape(-1, HOP) ** 2).mean(axis=1))
