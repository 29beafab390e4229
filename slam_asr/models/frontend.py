"""From a waveform to what an encoder takes: no weights needed, so that any process can do it.

Worker processes import this module and little else: torch, but not transformers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from slam_asr.audio import SAMPLE_RATE

COLUMN_SAMPLES, _FFT = 160, 400
"""Samples at 16 kHz: Whisper's spectrogram has a column every 10 ms, each over 25 ms."""


@dataclass
class Prepared:
    """An utterance as its encoder takes it."""

    inputs: list[torch.Tensor]
    """Whisper: log-mel spectrograms [mel bins, columns], one a window; where there are fewer columns than the window has,
    the last stands for all that follow. The others: the waveform [samples], once."""
    samples: int
    """Of the utterance, at 16 kHz."""

    def to(self, device: torch.device | str) -> "Prepared":
        """The same on a device."""
        return Prepared([i.to(device, non_blocking=True) for i in self.inputs], self.samples)


@dataclass(frozen=True)
class LogMel:
    """Whisper's log-mel spectrograms, as transformers' `WhisperFeatureExtractor` computes them.

    Of the window's silence behind the audio only one column is computed: all others are equal to it.
    """

    mel_bins: int
    window_samples: int
    split: bool
    """Whether audio longer than the window becomes several, rather than being cut."""

    def windows_of(self, samples: int) -> int:
        """Windows that an utterance takes."""
        return max(1, math.ceil(samples / self.window_samples)) if self.split else 1

    def __call__(self, waveform: np.ndarray) -> Prepared:
        """[samples] at 16 kHz in float32 → spectrograms in float32, one a window."""
        size = self.window_samples
        windows = [waveform[size * i : size * (i + 1)] for i in range(self.windows_of(len(waveform)))]
        return Prepared([self._spectrogram(w) for w in windows], len(waveform))

    def _spectrogram(self, waveform: np.ndarray) -> torch.Tensor:
        columns = self.window_samples // COLUMN_SAMPLES
        # A column reaches 200 samples to either side; what lies behind the last one that hears audio is silence.
        heard = min(columns, (len(waveform) + _FFT // 2) // COLUMN_SAMPLES + 1)
        shown = min(columns, heard + 1)
        padded = torch.zeros(self.window_samples if shown == columns else shown * COLUMN_SAMPLES + _FFT)
        padded[: len(waveform)] = torch.from_numpy(np.ascontiguousarray(waveform))
        centred = functional.pad(padded[None], (_FFT // 2, _FFT // 2), mode="reflect")[0]
        spectrum = torch.stft(
            centred, _FFT, COLUMN_SAMPLES, window=torch.hann_window(_FFT), center=False, return_complex=True
        )
        mel = _mel_filters(self.mel_bins).T @ spectrum[:, :shown].abs() ** 2
        log = torch.clamp(mel, min=1e-10).log10()
        return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class Waveform:
    """The waveform itself, layer-normalised over its own samples where the checkpoint wants it."""

    normalize: bool

    def __call__(self, waveform: np.ndarray) -> Prepared:
        """[samples] at 16 kHz in float32 → the same, normalised."""
        samples = torch.from_numpy(np.ascontiguousarray(waveform))
        # As fairseq does it: with an epsilon of 1e-5, which matters for quiet audio.
        return Prepared(
            [functional.layer_norm(samples, samples.shape) if self.normalize else samples], len(samples)
        )


Preparer = LogMel | Waveform


_FILTERS: dict[int, torch.Tensor] = {}


def _mel_filters(bins: int) -> torch.Tensor:
    """[201, bins]: triangles on Slaney's mel scale from 0 to 8 kHz, each of unit area (as librosa has them)."""
    if bins not in _FILTERS:
        frequencies = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)
        corners = _hertz(np.linspace(0.0, _mel(SAMPLE_RATE / 2), bins + 2))
        slopes = corners[None, :] - frequencies[:, None]
        widths = np.diff(corners)
        rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
        triangles = np.maximum(0.0, np.minimum(rising, falling))
        _FILTERS[bins] = torch.from_numpy(triangles * (2.0 / (corners[2:] - corners[:-2]))).float()
    return _FILTERS[bins]


# Slaney's scale: linear up to 1 kHz, which is 15 mel, and logarithmic from there, 27 mel for a factor of 6.4.
def _mel(hertz: float) -> float:
    return 3.0 * hertz / 200.0 if hertz < 1000.0 else 15.0 + math.log(hertz / 1000.0) * 27.0 / math.log(6.4)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * np.exp(math.log(6.4) / 27.0 * (mel - 15.0)))
