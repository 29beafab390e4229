"""An open audio file as a sequence of samples, or several such files as one sequence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

ESTIMATE_ERROR = 0.05
"""Fraction of the announced samples that may be missing if their number is an estimate. For MPEG audio of
layers I and II, or of a free bit rate, libsndfile estimates it from the bit rate. For files that ffmpeg
decodes, `media` estimates it from the times of the packets."""


@dataclass
class Sound:
    """An open audio file."""

    frames: int
    """Samples per channel."""
    sample_rate: int
    """Hz."""
    channels: int
    read: Callable[[int, int], Iterator[np.ndarray]]
    """Decodes `count` samples from the sample `first` (from 0) on, as blocks of float32 [samples, channels].
    A damaged file may give fewer samples."""
    sample_bytes: int = 0
    """Bytes of one sample of one channel in the file; 0 if it is compressed."""
    estimated: bool = False
    """Whether `frames` is an estimate, which may exceed the file's length by `ESTIMATE_ERROR`."""
    has_segments: bool = True
    """Whether a part can be read. If not, `read` decodes the complete file, whatever its arguments are."""


def joined(sounds: list[Sound]) -> Sound:
    """Return several files as one sequence of samples."""

    def read(first: int, count: int) -> Iterator[np.ndarray]:
        for sound in sounds:
            taken = max(0, min(count, sound.frames - first))
            if taken:
                done = 0
                for block in sound.read(first, taken):
                    yield block
                    done += len(block)
                if done < taken:  # the samples of later files would be at a wrong time
                    break
                count -= taken
            first = max(0, first - sound.frames)

    return Sound(sum(s.frames for s in sounds), sounds[0].sample_rate, sounds[0].channels, read)
