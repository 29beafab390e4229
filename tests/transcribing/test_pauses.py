"""Recordings are divided in their pauses: nothing that is heard is lost, and no part is longer than asked for."""

import numpy as np
import pytest
import soundfile

from slam_asr.audio import SAMPLE_RATE
from slam_asr.transcribing.pauses import MARGIN, divide


def recording(lengths, pauses, seed=0):
    """Noise like speech (louder and quieter within) with pauses of faint noise → samples, and where the speech is."""
    rng = np.random.default_rng(seed)
    pieces, spoken, at = [], [], 0
    for length, pause in zip(lengths, pauses, strict=True):
        loud = (
            rng.standard_normal(round(length * SAMPLE_RATE))
            * 0.1
            * (1.2 + np.sin(np.arange(round(length * SAMPLE_RATE)) / 2000))
        )
        faint = rng.standard_normal(round(pause * SAMPLE_RATE)) * 0.0005
        pieces += [loud, faint]
        spoken.append((at, at + len(loud)))
        at += len(loud) + len(faint)
    return np.concatenate(pieces).astype(np.float32), spoken


def test_cuts_are_in_the_pauses():
    samples, spoken = recording([4, 5, 3, 6, 4, 4], [0.6, 0.5, 0.8, 0.4, 0.6, 0.2])
    parts = divide(samples, 10)
    assert len(parts) > 1
    for part in parts:
        assert any(abs(part.start - start) <= (MARGIN + 0.05) * SAMPLE_RATE for start, _ in spoken)
        assert any(abs(part.end - end) <= (MARGIN + 0.05) * SAMPLE_RATE for _, end in spoken)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [2.0, 7.5, 30.0])
def test_parts_are_short_enough_and_hold_all_that_is_heard(seed, longest):
    rng = np.random.default_rng(seed)
    samples, spoken = recording(rng.uniform(0.3, 9, 12), rng.uniform(0.05, 2, 12), seed)
    parts = divide(samples, longest)
    covered = np.zeros(len(samples), bool)
    for part in parts:
        assert 0 < part.end - part.start <= longest * SAMPLE_RATE
        assert not covered[part.start : part.end].any()
        covered[part.start : part.end] = True
    heard = np.zeros(len(samples), bool)
    for start, end in spoken:
        heard[start:end] = True
    assert (heard & ~covered).sum() <= 0.002 * heard.sum()
    assert [p.start for p in parts] == sorted(p.start for p in parts)


def test_speech_without_any_pause_is_divided_all_the_same():
    samples, _ = recording([65], [0.01])
    parts = divide(samples, 20)
    assert sum(p.end - p.start for p in parts) >= 0.99 * len(samples) and len(parts) >= 4


@pytest.mark.parametrize(
    "samples",
    [np.zeros(0), np.zeros(5 * SAMPLE_RATE), np.full(100, 1e-6)],
    ids=["nothing", "silence", "next to silence"],
)
def test_where_nothing_is_heard_there_is_no_part(samples):
    assert divide(samples.astype(np.float32), 20) == []


def test_one_short_word_is_one_part():
    samples, _ = recording([0.4], [3])
    (part,) = divide(samples, 20)
    assert part.start == 0 and part.end < 1.0 * SAMPLE_RATE


def test_real_speech_end_to_end_is_cut_between_sentences_mostly(libri_mini):
    """Utterances one behind the other: most cuts are near a bound between two, where LibriSpeech has its pauses."""
    files = sorted(libri_mini.glob("test-other/*/*/*.flac"))[:12]
    clips = [soundfile.read(f, dtype="float32")[0] for f in files]
    bounds = np.cumsum([len(c) for c in clips]) / SAMPLE_RATE
    samples = np.concatenate(clips)
    parts = divide(samples, 25)
    assert all(p.end - p.start <= 25 * SAMPLE_RATE for p in parts)
    loud = np.abs(samples) > 0.1 * np.abs(samples).max()
    kept = sum(loud[p.start : p.end].sum() for p in parts)
    assert kept == loud.sum()
    assert len(parts) < 2.5 * bounds[-1] / 25 + 1
