"""Recordings are divided at pauses: no speech is lost, and no part exceeds the maximum length."""

import numpy as np
import pytest
import soundfile

from slam_asr.audio import SAMPLE_RATE
from slam_asr.decoding.pauses import MARGIN_SECONDS, divide


def recording(lengths, pauses, seed=0):
    """Make bursts of noise of varying loudness, separated by pauses of faint noise.

    Args:
        lengths: seconds of each burst.
        pauses: seconds of the pause after each burst.
        seed: seed of the noise.

    Returns:
        float32 [samples] at 16 kHz, and the (start, end) of each burst in samples.
    """
    rng = np.random.default_rng(seed)
    pieces, bursts, position = [], [], 0
    for length, pause in zip(lengths, pauses, strict=True):
        loud = (
            rng.standard_normal(round(length * SAMPLE_RATE))
            * 0.1
            * (1.2 + np.sin(np.arange(round(length * SAMPLE_RATE)) / 2000))
        )
        faint = rng.standard_normal(round(pause * SAMPLE_RATE)) * 0.0005
        pieces += [loud, faint]
        bursts.append((position, position + len(loud)))
        position += len(loud) + len(faint)
    return np.concatenate(pieces).astype(np.float32), bursts


def test_cuts_are_in_the_pauses():
    samples, bursts = recording([4, 5, 3, 6, 4, 4], [0.6, 0.5, 0.8, 0.4, 0.6, 0.2])
    parts = divide(samples, 10)
    assert len(parts) > 1
    for part in parts:
        assert any(abs(part.start - start) <= (MARGIN_SECONDS + 0.05) * SAMPLE_RATE for start, _ in bursts)
        assert any(abs(part.stop - end) <= (MARGIN_SECONDS + 0.05) * SAMPLE_RATE for _, end in bursts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [2.0, 7.5, 30.0])
def test_parts_are_short_enough_and_contain_all_speech(seed, longest):
    rng = np.random.default_rng(seed)
    samples, bursts = recording(rng.uniform(0.3, 9, 12), rng.uniform(0.05, 2, 12), seed)
    parts = divide(samples, longest)
    covered = np.zeros(len(samples), bool)
    for part in parts:
        assert 0 < part.stop - part.start <= longest * SAMPLE_RATE
        assert not covered[part.start : part.stop].any()
        covered[part.start : part.stop] = True
    is_speech = np.zeros(len(samples), bool)
    for start, end in bursts:
        is_speech[start:end] = True
    assert (is_speech & ~covered).sum() <= 0.002 * is_speech.sum()
    assert [p.start for p in parts] == sorted(p.start for p in parts)


def test_speech_without_pauses_is_divided_too():
    samples, _ = recording([65], [0.01])
    parts = divide(samples, 20)
    assert sum(p.stop - p.start for p in parts) >= 0.99 * len(samples) and len(parts) >= 4


@pytest.mark.parametrize(
    "samples",
    [np.zeros(0), np.zeros(5 * SAMPLE_RATE), np.full(100, 1e-6)],
    ids=["nothing", "silence", "almost silence"],
)
def test_silence_has_no_parts(samples):
    assert divide(samples.astype(np.float32), 20) == []


def test_one_short_word_is_one_part():
    samples, _ = recording([0.4], [3])
    (part,) = divide(samples, 20)
    assert part.start == 0 and part.stop < 1.0 * SAMPLE_RATE


def test_real_speech_is_divided_into_few_parts_that_contain_every_loud_sample(libri_mini):
    files = sorted(libri_mini.glob("test-other/*/*/*.flac"))[:12]
    samples = np.concatenate([soundfile.read(f, dtype="float32")[0] for f in files])
    parts = divide(samples, 25)
    assert all(p.stop - p.start <= 25 * SAMPLE_RATE for p in parts)
    loud = np.abs(samples) > 0.1 * np.abs(samples).max()
    covered = sum(loud[p.start : p.stop].sum() for p in parts)
    assert covered == loud.sum()
    assert len(parts) < 2.5 * len(samples) / SAMPLE_RATE / 25 + 1
