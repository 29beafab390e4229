"""Every audio file is decoded to mono at 16 kHz with the announced duration, or raises an `AudioError`."""

import struct

import numpy as np
import pytest
import soundfile

from slam_asr import audio
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.audio import SAMPLE_RATE, AudioError, audio_sha256, count_samples, load_audio, read_clip
from slam_asr.errors import UserError
from slam_asr.storage import sha256_of_file, write_bytes
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
def test_every_format_decodes_to_the_written_tone(tmp_path, suffix):
    samples = load_audio(write_wav(tmp_path / f"x{suffix}", make_tone(1.0, frequency=440)))
    assert samples.dtype == np.float32
    assert samples.shape == (16_000,)
    assert loudest_frequency(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_lossless_files_decode_to_exactly_the_written_samples(tmp_path, suffix):
    steps = np.array([0, 1, -1, 32767, -32768, 1000], dtype=np.int16)
    soundfile.write(tmp_path / f"x{suffix}", steps, 16_000, subtype="PCM_16")
    assert np.array_equal(load_audio(tmp_path / f"x{suffix}"), steps / np.float32(32768))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_preserves_pitch_and_length(tmp_path, rate):
    samples = load_audio(write_wav(tmp_path / "x.wav", make_tone(1.0, rate, 440), rate))
    assert len(samples) == pytest.approx(16_000, abs=1)
    assert loudest_frequency(samples) == pytest.approx(440, abs=2)


def test_frequencies_above_the_nyquist_limit_do_not_alias(tmp_path):
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
    assert duration == float(f"{duration:.7f}"), "seven decimals are enough"


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "none.wav").reason == "missing audio"
    assert refusal(tmp_path).reason == "missing audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_zero_bytes_is_refused_as_empty(tmp_path, suffix):
    (tmp_path / f"x{suffix}").touch()
    assert refusal(tmp_path / f"x{suffix}").reason == "empty audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_without_samples_is_refused_as_empty(tmp_path, suffix):
    assert refusal(write_wav(tmp_path / f"x{suffix}", np.zeros(0, np.float32))).reason == "empty audio"


def test_a_file_too_short_for_one_sample_at_16_khz_is_refused_as_empty(tmp_path):
    assert refusal(write_wav(tmp_path / "x.wav", np.ones(1, np.float32), 96_000)).reason == "empty audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_file_with_an_audio_suffix_is_unreadable(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_text("this is no audio\n" * 100)
    assert refusal(tmp_path / f"x{suffix}").reason == "unreadable audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_truncated_file_is_unreadable(tmp_path, suffix, share):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_a_file_without_its_last_bytes_is_unreadable(tmp_path, suffix):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    path.write_bytes(path.read_bytes()[:-3])
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".opus"])
def test_a_file_with_damage_in_the_middle_is_unreadable(tmp_path, suffix):
    path = write_wav(tmp_path / f"x{suffix}", noise(5.0))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    assert refusal(path).reason == "unreadable audio"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_nan_and_infinite_samples_are_refused(tmp_path, value, rate):
    samples = make_tone(1.0, rate)
    samples[100] = value
    assert (
        refusal(write_wav(tmp_path / "x.wav", samples, rate, subtype="FLOAT")).reason == "non-finite samples"
    )


def test_a_wav_written_to_a_pipe_is_read(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(1.0))
    content = bytearray(path.read_bytes())
    length_offset = content.index(b"data") + 4
    content[length_offset : length_offset + 4] = content[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(load_audio(path)) == 16_000


def test_a_wav_with_other_chunks_around_its_samples_is_read(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(1.0))
    content = path.read_bytes()
    offset = content.index(b"data")
    odd = b"LIST" + struct.pack("<I", 5) + b"hello\0"
    path.write_bytes(content[:offset] + odd + content[offset:] + odd)
    assert len(load_audio(path)) == 16_000
    path.write_bytes(content[:offset] + odd + content[offset:-1000])
    assert refusal(path).reason == "unreadable audio"


def test_a_flac_without_a_length_is_refused_with_a_remedy(tmp_path):
    path = write_wav(tmp_path / "x.flac", make_tone(1.0))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert "write it again" in str(refusal(path))


def test_an_absurd_length_in_the_header_is_refused_before_memory_is_allocated(tmp_path):
    path = write_wav(tmp_path / "x.flac", make_tone(1.0))
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(AudioError, match="longer than 30 s"):
        read_clip(path, max_duration=30.0)
    assert refusal(path).reason == "unreadable audio"


def test_an_absurd_sample_rate_is_refused(tmp_path):
    assert refusal(write_wav(tmp_path / "x.wav", make_tone(1.0), rate=1)).reason == "unreadable audio"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("sound", [noise, make_tone])
def test_a_segment_equals_the_same_part_of_the_complete_file(tmp_path, suffix, rate, sound):
    # In the mp3 of a tone, frames use bits of earlier frames, so reading must begin before the segment.
    path = write_wav(tmp_path / f"x{suffix}", sound(3.0, rate), rate)
    complete = load_audio(path)
    segment = read_clip(path, start=1.25, duration=0.5).samples
    assert len(segment) == 8_000
    # At the edges, the resampler lacks the neighbouring samples.
    assert np.abs(segment[200:-200] - complete[20_200:27_800]).max() < 2e-3
    assert len(read_clip(path, start=2.5).samples) == pytest.approx(8_000, abs=1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("duration", [0.1, 0.33337, 1.00001])
def test_a_segment_that_is_loaded_with_its_measured_duration_has_this_length(tmp_path, rate, duration):
    path = write_wav(tmp_path / "x.wav", noise(2.0, rate), rate)
    measured = read_clip(path, start=0.7, duration=duration).duration
    again = load_utterance(Utterance("a", str(path), "x", measured, start=0.7))
    assert len(again) == round(measured * SAMPLE_RATE)


def test_a_segment_may_exceed_the_file_by_half_a_second_at_most(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(2.0))
    assert read_clip(path, start=1.5, duration=0.9).duration == 0.5
    for start, duration in ((1.5, 1.1), (2.0, 0.1), (7.0, None)):
        with pytest.raises(AudioError, match=r"lasts 2\.00 s") as caught:
            read_clip(path, start=start, duration=duration)
        assert caught.value.reason == "segment beyond the file's end"


def test_the_limit_on_the_duration_applies_to_the_segment(tmp_path):
    path = write_wav(tmp_path / "x.wav", make_tone(3.0))
    assert read_clip(path, max_duration=1.0, start=1.0, duration=1.0).duration == 1.0
    with pytest.raises(AudioError, match="longer than 1 s"):
        read_clip(path, max_duration=1.0, start=1.0, duration=1.5)


@pytest.mark.parametrize("start", [None, 0.5])
@pytest.mark.parametrize("remote", [False, True])
def test_an_utterance_is_loaded_only_from_the_file_that_its_manifest_was_built_from(
    tmp_path, bucket, remote, start
):
    file = write_wav(tmp_path / "x.flac", noise(1.0))
    path = "s3://bucket/deep/x.flac" if remote else str(file)
    utterance = Utterance("a", path, "x", 0.25 if start else 1.0, sha256=sha256_of_file(file), start=start)
    write_bytes(path, file.read_bytes())
    first = round((start or 0) * SAMPLE_RATE)
    expected = load_audio(file)[first : first + round(utterance.duration * SAMPLE_RATE)]
    assert np.array_equal(load_utterance(utterance), expected)
    assert audio_sha256(path) == utterance.sha256
    assert count_samples(path) == SAMPLE_RATE
    write_bytes(path, write_wav(tmp_path / "y.flac", make_tone(1.0)).read_bytes())
    with pytest.raises(UserError, match="was changed since its manifest was built"):
        load_utterance(utterance)


def test_a_file_with_many_segments_is_hashed_once(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "x.wav", noise(2.0))
    sha256, hashed = sha256_of_file(path), []
    monkeypatch.setattr(audio, "sha256_of_file", lambda file: hashed.append(file) or sha256)
    for start in (0.0, 0.5, 1.0):
        load_utterance(Utterance("a", str(path), "x", 0.5, sha256=sha256, start=start))
    assert len(hashed) == 1


@pytest.mark.parametrize("start", [None, 0.5])
@pytest.mark.parametrize(
    "where", ["s3://bucket/none.wav", "s3://no-such-bucket/none.wav", "{tmp_path}/none.wav"]
)
def test_missing_audio_is_reported_as_such_on_disk_and_in_object_storage(tmp_path, bucket, where, start):
    path = where.format(tmp_path=tmp_path)
    for read in (
        audio_sha256,
        count_samples,
        load_audio,
        lambda p: load_utterance(Utterance("a", p, "x", 1.0, start=start)),
    ):
        with pytest.raises(AudioError, match="There is no audio file") as caught:
            read(path)
        assert caught.value.reason == "missing audio"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus"])
def test_a_truncated_object_is_unreadable(tmp_path, bucket, suffix):
    content = write_wav(tmp_path / f"x{suffix}", noise(2.0)).read_bytes()
    write_bytes(f"s3://bucket/x{suffix}", content[:-3])
    assert refusal(f"s3://bucket/x{suffix}").reason == "unreadable audio"
