"""Mixes channels, measures levels and resamples to 16 kHz, block by block."""

import os

import numpy as np
import soxr

from slam_asr.audio.faults import AudioError, Fault

SAMPLE_RATE = 16_000
"""Hz. Every supported encoder was trained at this rate."""

_FULL_SCALE_LIMIT = 4.0
"""Largest absolute sample value. Loudly mastered float samples reach 2, and decoders of lossy formats
exceed 1 slightly. Float samples in the range of integers reach hundreds, even in quiet speech."""
_SILENT_RANGE = 2.0**-15
"""A recording whose samples differ by less than one step of 16 bits holds no sound."""
_CANCELLED_POWER = 1e-4
"""If one channel is the inverse of another, their mean has less than this share of their power (-40 dB)."""


class Mixdown:
    """Collects the blocks of a recording as mono at 16 kHz.

    Args:
        path: the file's name in messages.
        sample_rate: Hz.
        channel: number of the channel to use, counted from 0; None for the mean of all.
    """

    def __init__(self, path: str | os.PathLike, sample_rate: int, channel: int | None) -> None:
        self.path, self.channel = path, channel
        self.count = 0
        """Number of samples so far, before resampling."""
        self._low, self._high, self._energy, self._mono_energy = np.inf, -np.inf, 0.0, 0.0
        self._parts: list[np.ndarray] = []
        # Resampling in blocks gives exactly the same samples as resampling the complete recording.
        self._resampler: soxr.ResampleStream | None = None
        if sample_rate != SAMPLE_RATE:
            self._resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def add(self, block: np.ndarray) -> None:
        """Add the next block, float32 [samples, channels].

        Raises:
            AudioError: a sample is not finite, or far above full scale, which is 1.
        """
        if len(block) == 0:
            return
        mono, energy = _mono(block, self.channel)
        self.count += len(mono)
        low, high = float(mono.min()), float(mono.max())
        # NumPy's minimum and maximum are NaN if any sample is, so `peak` is too.
        peak = max(-low, high)
        if not np.isfinite(peak):
            raise AudioError(
                f"{self.path} has samples that are not finite (NaN or infinite).", Fault.NOT_FINITE
            )
        if peak > _FULL_SCALE_LIMIT:
            raise AudioError(
                f"{self.path} has samples up to {peak:.5g}, but full scale is 1: if they are 16-bit numbers "
                "written as floats, divide them by 32768 and write the file again.",
                Fault.TOO_LOUD,
            )
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._energy += energy
        self._mono_energy += float(np.vdot(mono, mono)) if energy else 0.0
        self._parts.append(mono if self._resampler is None else self._resampler.resample_chunk(mono))

    def finish(self) -> np.ndarray:
        """Return float32 [samples], mono at 16 kHz."""
        if self._resampler is not None and self._parts:
            # The filter looks ahead, so the resampler holds back the last samples until the end is known.
            self._parts.append(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        parts, self._parts = self._parts, []
        samples = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])
        return np.ascontiguousarray(samples, dtype=np.float32)

    @property
    def silent(self) -> bool:
        """Whether all samples are the same at a precision of 16 bits."""
        return self._high - self._low < _SILENT_RANGE

    @property
    def cancelled(self) -> bool:
        """Whether the channels cancel each other in their mean."""
        return self._energy > 0 and self._mono_energy < _CANCELLED_POWER * self._energy


def _mono(samples: np.ndarray, channel: int | None) -> tuple[np.ndarray, float]:
    """Return one channel of float32 [samples, channels], or the mean of all.

    Returns:
        float32 [samples]; and the mean energy of the channels, or 0 if no mean of samples was taken.
    """
    channels = samples.shape[1]
    if channels == 1 or channel is not None:
        return samples[:, channel or 0], 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # samples that are not finite raise an error later
        return samples.mean(axis=1, dtype=np.float32), float(np.vdot(samples, samples)) / channels
