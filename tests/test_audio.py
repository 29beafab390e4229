"""Waveforms: every kind of file gives 16-kHz mono of the length that its duration says, or an `AudioError`."""

import math
import struct

import numpy as np
import pytest
import soundfile

from slam_asr.audio import SAMPLE_RATE, AudioError, audio_sha256, count_samples, load_audio, load_utterance, read_clip
from slam_asr.errors import UserError
from slam_asr.manifest import Utterance
from tests.conftest import make_tone, write_wav

SUFFIXES = [".wav", ".flac", ".ogg", ".opus", ".mp3"]


def refusal(path) -> AudioError:
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count(". ") == 0
    return caught.value


def loudest_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / len(samples)


def noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_tone_that_was_written(tmp_path, suffix):
    samples = load_audio(write_wav(tmp_path / f"x{suffix}", make_tone(1.0, frequency=440)))
    assert samples.dtype == np.float32
    assert samples.shape == (16_000,)
    assert loudest_frequency(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_lossless_files_give_their_very_samples(tmp_path, suffix):
    steps = np.array([0, 1, -1, 32767, -32768, 1000], dtype=np.int16)
    soundfile.write(tmp_path / f"x{suffix}", steps, 16_000, subtype="PCM_16")
    assert np.array_equal(load_audio(tmp_path / f"x{suffix}"), steps / np.float32(32768))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_rates_keep_pitch_and_length(tmp_path, rate):
    samples = load_audio(write_wav(tmp_path / "x.wav", make_tone(1.0, rate, 440), rate))
    assert len(samples) == pytest.approx(16_000, abs=1)
    assert loudest_frequency(samples) == pytest.approx(440, abs=2)


def test_what_lies_above_half_the_rate_is_not_folded_down(tmp_path):
    samples = load_audio(write_wav(tmp_path / "x.wav", make_tone(1.0, 48_000, 12_000), 48_000))
    assert np.abs(samples[1000:-1000]).max() < 1e-3


def test_channels_are_averaged(tmp_path):
    left, right = make_tone(0.5), noise(0.5)
    path = write_wav(tmp_path / "x.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.allclose(load_audio(path), (left + right) / 2, atol=1e-7)
    clip = read_clip(path)
    assert (clip.sample_rate, clip.channels) == (16_000, 2)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("count", [319, 320, 321, 7_777, 16_001, 70_001])
def test_the_duration_names_the_exact_number_of_samples(tmp_path, rate, count):
    path = write_wav(tmp_path / "x.wav", noise(count / rate, rate), rate)
    samples, duration = load_audio(path), read_clip(path).duration
    assert round(duration * SAMPLE_RATE) == len(samples)
    assert math.ceil(round(duration * SAMPLE_RATE) / 320) == math.ceil(len(samples) / 320)
    assert duration == float(f"{duration:.7f}"), "seven decimals hold it"


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "none.wav").reason == "missing audio"
    assert refusal(tmp_path).reason == "missing audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_bytes_is_refused_as_empty(tmp_path, suffix):
    (tmp_path / f"x{suffix}").touch()
    assert refusal(tmp_path / f"x{suffix}").reason == "empty audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_without_samples_is_refused_as_empty(tmp_path, suffix):
    assert refusal(write_wav(tmp_path / f"x{suffix}", np.zeros(0, np.float32))).reason == "empty audio"


def test_a_file_too_short_for_one_sample_at_16_khz_is_refused_as_empty(tmp_path):
    assert refusal(write_wav(tmp_path / "x.wav", np.ones(1, np.float32), 96_000)).reason == "empty audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_under_an_audio_name_is_unreadable(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_text("this is no audio\n" * 100)
    assert refusal(tmp_path / f"x{suffix}").reason == "unreadable audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_unreadable(tmp_path, suffix, kept):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_a_file_that_lacks_its_last_bytes_is_unreadable(tmp_path, suffix):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    path.write_bytes(path.read_bytes()[:-3])
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".opus"])
def test_a_file_that_is_damaged_inside_is_unreadable(tmp_path, suffix):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value, rate):
    samples = make_tone(1.0, rate)
    samples[100] = value
    assert refusal(write_wav(tmp_path / "x.wav", samples, rate, subtype="FLOAT")).reason == "non-finite samples"


def test_a_wav_that_was_written_to_a_pipe_is_read(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(1.0))
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(load_audio(path)) == 16_000


def test_a_wav_with_chunks_around_its_samples_is_read(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(1.0))
    content = path.read_bytes()
    at = content.index(b"data")
    odd = b"LIST" + struct.pack("<I", 5) + b"hello\0"
    path.write_bytes(content[:at] + odd + content[at:] + odd)
    assert len(load_audio(path)) == 16_000
    path.write_bytes(content[:at] + odd + content[at:-1000])
    assert refusal(path).reason == "unreadable audio"


def test_a_flac_without_a_length_is_refused_with_a_remedy(tmp_path):
    path = write_wav(tmp_path / "x.flac", make_tone(1.0))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert "write it anew" in str(refusal(path))


def test_a_header_that_announces_far_too_much_is_refused_before_it_fills_the_memory(tmp_path):
    path = write_wav(tmp_path / "x.flac", make_tone(1.0))
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(AudioError, match="longer than 30 s"):
        read_clip(path, longest=30.0)
    assert refusal(path).reason == "unreadable audio"


def test_an_absurd_sample_rate_is_refused(tmp_path):
    assert refusal(write_wav(tmp_path / "x.wav", make_tone(1.0), rate=1)).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_stretch_of_a_file_is_that_part_of_it(tmp_path, suffix):
    ramp = (np.arange(48_000) / 48_000).astype(np.float32)
    path = write_wav(tmp_path / f"x{suffix}", ramp)
    whole = load_audio(path)
    stretch = load_utterance(Utterance("k", str(path), "t", 0.5, start=1.25))
    assert len(stretch) == 8000 and np.allclose(stretch, whole[20_000:28_000], atol=1e-6 if suffix != ".ogg" else 0.05)


def test_a_stretch_beyond_the_end_is_refused_and_a_rounding_error_is_not(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(1.0))
    assert len(read_clip(path, start=0.5, duration=0.51).samples) == 8000
    with pytest.raises(AudioError, match="lasts 1.00 s, and an utterance of it is to end at 1.50 s"):
        read_clip(path, start=0.5, duration=1.0)


def test_audio_in_object_storage_is_what_it_is_on_disk(bucket, tmp_path):
    path = write_wav(tmp_path / "x.flac", make_tone(0.7))
    bucket.upload_file(str(path), "a b/ü.flac")
    remote = "s3://bucket/a b/ü.flac"
    assert np.array_equal(load_audio(remote), load_audio(path))
    assert audio_sha256(remote) == audio_sha256(str(path)) and count_samples(remote) == count_samples(path) == 11_200
    utterance = Utterance("k", remote, "t", 0.7, sha256=audio_sha256(remote))
    assert np.array_equal(load_utterance(utterance), load_audio(path))
    bucket.put_object(Key="a b/ü.flac", Body=b"something else")
    with pytest.raises(UserError, match="was changed since its manifest was built"):
        load_utterance(utterance)
    with pytest.raises(AudioError, match="There is no audio file s3://bucket/none.wav") as raised:
        load_audio("s3://bucket/none.wav")
    assert raised.value.reason == "missing audio"
