"""Functions that turn waveforms into encoder inputs. They need no weights, so any process can run them.

Worker processes import this module and torch, but not transformers, so that they start fast.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from slam_asr.audio import SAMPLE_RATE

COLUMN_SAMPLES, _FFT = 160, 400
"""Hop and window length of Whisper's spectrogram in samples at 16 kHz: 10 ms and 25 ms."""


@dataclass
class Prepared:
    """One utterance, ready to be encoded."""

    inputs: list[torch.Tensor]
    """For Whisper: a float32 log-mel spectrogram [mel bins, columns] per window. If it has fewer columns than
    the window, the encoder repeats its last column up to the window's end. For the other encoders: one
    float32 waveform [samples]."""
    samples: int
    """Length of the utterance in samples at 16 kHz."""

    def to(self, device: torch.device | str) -> "Prepared":
        """Return a copy with the inputs on a device."""
        return Prepared([i.to(device, non_blocking=True) for i in self.inputs], self.samples)


@dataclass(frozen=True)
class LogMel:
    """Computes Whisper's log-mel spectrograms as transformers' `WhisperFeatureExtractor` does.

    Only one column of the silence after the audio is computed, because all columns of silence are equal.
    """

    mel_bins: int
    window_samples: int
    split: bool
    """Whether audio that is longer than the window is split into several windows; if not, it is cut."""

    def windows_of(self, samples: int) -> int:
        """Return the number of windows of an utterance of `samples` samples at 16 kHz."""
        return max(1, math.ceil(samples / self.window_samples)) if self.split else 1

    def __call__(self, waveform: np.ndarray) -> Prepared:
        """Compute an utterance's spectrograms.

        Args:
            waveform: [samples] float32 at 16 kHz.

        Returns:
            One float32 spectrogram [mel bins, columns] per window.
        """
        size = self.window_samples
        windows = [waveform[size * i : size * (i + 1)] for i in range(self.windows_of(len(waveform)))]
        return Prepared([self._spectrogram(w) for w in windows], len(waveform))

    def _spectrogram(self, waveform: np.ndarray) -> torch.Tensor:
        columns = self.window_samples // COLUMN_SAMPLES
        # A column covers 200 samples on either side of its centre. All columns after the last one that
        # overlaps the audio are silence, and one of them is computed.
        with_audio = min(columns, (len(waveform) + _FFT // 2) // COLUMN_SAMPLES + 1)
        computed = min(columns, with_audio + 1)
        # As in Whisper, the window is extended by its mirror image at both ends. If columns are omitted, the
        # extra zeros prevent the mirror image on the right from reaching a computed column.
        padded = torch.zeros(self.window_samples if computed == columns else computed * COLUMN_SAMPLES + _FFT)
        padded[: len(waveform)] = torch.from_numpy(np.ascontiguousarray(waveform))
        centred = functional.pad(padded[None], (_FFT // 2, _FFT // 2), mode="reflect")[0]
        spectrum = torch.stft(
            centred, _FFT, COLUMN_SAMPLES, window=torch.hann_window(_FFT), center=False, return_complex=True
        )
        mel = _mel_filters(self.mel_bins).T @ spectrum[:, :computed].abs() ** 2
        # Whisper's scaling: the log10 is limited to 8 (80 dB) below its maximum, shifted, and divided by 4.
        log = torch.clamp(mel, min=1e-10).log10()
        # The omitted columns are silence, the smallest possible value, so they cannot contain the maximum.
        return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class Waveform:
    """Returns the waveform itself, layer-normalised over its samples if the checkpoint needs that."""

    normalize: bool

    def __call__(self, waveform: np.ndarray) -> Prepared:
        """Prepare an utterance.

        Args:
            waveform: [samples] float32 at 16 kHz.

        Returns:
            One float32 waveform [samples], normalised if required.
        """
        samples = torch.from_numpy(np.ascontiguousarray(waveform))
        # The default epsilon is fairseq's, 1e-5. transformers uses 1e-7: the results differ for quiet audio.
        return Prepared(
            [functional.layer_norm(samples, samples.shape) if self.normalize else samples], len(samples)
        )


Preparer = LogMel | Waveform


@functools.cache
def _mel_filters(bins: int) -> torch.Tensor:
    """Return filters [201 frequencies, bins]: triangles of unit area on Slaney's mel scale, as in librosa."""
    frequencies = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    corners = _hertz(np.linspace(0.0, _mel(SAMPLE_RATE / 2), bins + 2))
    slopes = corners[None, :] - frequencies[:, None]
    widths = np.diff(corners)
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    # Each filter rises from its left corner to its centre and falls to its right corner; 0 elsewhere.
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    # A triangle of height 1 and width w has the area w / 2, so a height of 2 / w gives unit area.
    return torch.from_numpy(triangles * (2.0 / (corners[2:] - corners[:-2]))).float()


# Slaney's mel scale is linear up to 1 kHz (15 mel). Above, it is logarithmic: 27 mel per factor of 6.4.
def _mel(hertz: float) -> float:
    return 3.0 * hertz / 200.0 if hertz < 1000.0 else 15.0 + math.log(hertz / 1000.0) * 27.0 / math.log(6.4)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * np.exp(math.log(6.4) / 27.0 * (mel - 15.0)))
