"""Synthetic recording conditions for speech: room, microphone, noise and level."""

from dataclasses import dataclass

import numpy as np
import soxr

SAMPLE_RATE = 16_000
SILENCE = 0.01  # fraction of the peak: quieter samples at both ends are trimmed
MARGIN_S = 0.06  # seconds that are retained on both sides of the trimmed speech


@dataclass(frozen=True)
class Conditions:
    """How much recordings differ."""

    room: float
    """Share of the recordings with echo."""
    reverberation: tuple[float, float]
    """Range of the seconds in which the echo decays by 60 dB."""
    direct: tuple[float, float]
    """Range of the level of the direct sound in dB, relative to the echo."""
    noise: float
    """Share of the recordings with noise."""
    snr: tuple[float, float]
    """Range of the signal-to-noise ratio in dB."""
    tilt: float
    """The microphone's response falls or rises by at most this many dB from 100 Hz to 8 kHz."""
    peak: tuple[float, float]
    """Range of the largest sample; its logarithm is uniformly distributed."""


CALM = Conditions(0.3, (0.1, 0.25), (8, 18), 0.5, (22, 40), 4, (0.2, 0.7))
VARIED = Conditions(0.4, (0.1, 0.6), (2, 18), 0.7, (8, 40), 10, (0.05, 0.9))


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut silence off both ends of float32 [samples]."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE * np.abs(samples).max())
    margin = round(MARGIN_S * SAMPLE_RATE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Change the speed, and with it the pitch, of float32 [samples]; 2 halves the duration."""
    return soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE)


def disturb(samples: np.ndarray, conditions: Conditions, rng: np.random.Generator) -> np.ndarray:
    """Add echo and noise to some of the speech, and give all of it a microphone's response and a level.

    Args:
        samples: float32 [samples] at SAMPLE_RATE Hz.
        conditions: the ranges from which the values are drawn.
        rng: the source of randomness.

    Returns:
        float32 [samples], of the same length.
    """
    if rng.random() < conditions.room:
        samples = _with_echo(
            samples, rng.uniform(*conditions.reverberation), rng.uniform(*conditions.direct), rng
        )
    samples = _tilted(samples, rng.uniform(-conditions.tilt, conditions.tilt))
    if rng.random() < conditions.noise:
        samples = samples + _noise(samples, rng.uniform(*conditions.snr), rng)
    low, high = np.log(conditions.peak)
    return (samples * (np.exp(rng.uniform(low, high)) / max(np.abs(samples).max(), 1e-6))).astype(np.float32)


def _with_echo(samples: np.ndarray, seconds: float, direct: float, rng: np.random.Generator) -> np.ndarray:
    """Add an echo: noise that decays by 60 dB in `seconds`.

    Its energy is `direct` dB below that of the direct sound.
    """
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    echo[: round(rng.uniform(0.001, 0.01) * SAMPLE_RATE)] = 0  # until the first reflection
    echo *= 10 ** (-direct / 20) / np.sqrt(np.sum(echo**2))
    echo[0] = 1.0
    # The FFT computes a circular convolution. With this size, the end of the echo does not wrap to the start.
    size = len(samples) + len(echo)
    return np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(echo, size), size)[: len(samples)]


def _tilted(samples: np.ndarray, decibels: float) -> np.ndarray:
    """Raise the spectrum by `decibels` from 100 Hz to 8 kHz, evenly per octave."""
    spectrum = np.fft.rfft(samples)
    frequencies = np.maximum(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE), 100)
    gains = decibels * np.log(frequencies / 100) / np.log(8000 / 100)
    return np.fft.irfft(spectrum * 10 ** (gains / 20), len(samples))


def _noise(samples: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Return noise `snr` dB below the samples, with a spectrum from white to brown."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    # The amplitude is divided by a random power of the frequency. Below 20 Hz, 1/400 of the spectrum's 8 kHz,
    # the divisor is constant.
    spectrum /= np.maximum(np.arange(len(spectrum)), len(spectrum) / 400) ** rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, len(samples))
    level = np.sqrt(np.mean(samples**2) / max(np.mean(noise**2), 1e-12))
    return noise * level * 10 ** (-snr / 20)
