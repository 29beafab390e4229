"""Files of phones and browsers are decoded to the recorded samples, or are refused in one sentence."""

import re
import sys

import numpy as np
import pytest
import soundfile
import soxr

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.utterances import load_utterance, samples_of
from slam_asr.audio import SAMPLE_RATE, AudioError, count_samples, load_checked, read_clip
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import ConfigurationError
from slam_asr.stages.build_manifest import build_manifest
from tests.conftest import make_tone
from tests.media import FORMATS, LOSSLESS, caf_with_aac, encoded, repeated
from tests.memory import peak_of_anonymous_memory

SECONDS = 1.3
FRAME = {"aac": 1024, "alac": 4096, "libopencore_amrnb": 160, "wmav2": 2048, "libopus": 960}
"""Samples per frame, keyed by encoder."""

EXACT = ("m4a", "mp4", "mov", "webm", "webm without length", *LOSSLESS)
"""Formats that mark at which decoded sample the recording begins and, in most of them, at which it ends."""


def sound(name: str, channels: int = 1) -> np.ndarray:
    """Make a tone that rises from 300 to 1500 Hz: float32 [samples, channels] at the format's rate."""
    rate = FORMATS[name][2]
    t = np.arange(round(SECONDS * rate)) / rate
    # Without a fade, lossy encoders add a click at both ends.
    fade = np.clip(np.minimum(t, SECONDS - t) / 0.1, 0, 1)
    tone = 0.3 * fade * np.sin(2 * np.pi * (300 * t + (1200 / SECONDS / 2) * t**2))
    return np.tile(tone[:, None].astype(np.float32), channels)


def at_16_khz(samples: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")


def refusal(content: bytes, name: str = "x", **options) -> str:
    with pytest.raises(AudioError) as caught:
        read_clip(name, content=content, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", [*FORMATS, "caf aac"])
def test_a_recording_has_its_length_and_its_sound(name, tmp_path):
    # The Core Audio file contains the AAC of an m4a.
    source = "m4a" if name == "caf aac" else name
    _, codec, rate, _ = FORMATS[source]
    original = sound(source)
    content = caf_with_aac(original, rate) if name == "caf aac" else encoded(name, original)
    path = tmp_path / "recording.bin"
    path.write_bytes(content)
    clip = read_clip(path)
    assert (clip.sample_rate, clip.channels) == (rate, 1)
    assert count_samples(path) == pytest.approx(len(clip.samples), abs=1)
    # AMR, AAC without a container and MP4 in fragments do not state what the encoder added before and after.
    frames = 2 if name in ("aac", "amr", "mp4 in fragments", "mp4 opus in fragments") else 1
    assert abs(clip.duration - SECONDS) <= frames * FRAME.get(codec, 1) / rate
    if name in EXACT:
        assert clip.duration == pytest.approx(SECONDS, abs=1 / SAMPLE_RATE), "the length is exact"
    expected = at_16_khz(original, rate)
    frame = SAMPLE_RATE * FRAME.get(codec, 1) // rate
    middle = slice(4_000, 14_000)
    agreement = {
        lag: np.corrcoef(expected[middle], np.roll(clip.samples, -lag)[middle])[0, 1]
        for lag in range(-frame, frames * frame + 1)
    }
    assert max(agreement.values()) > 0.98
    if name in EXACT:
        assert agreement[0] > 0.999
    if name in LOSSLESS:
        soundfile.write(tmp_path / "x.wav", original, rate, subtype="PCM_16")
        assert np.abs(clip.samples - read_clip(tmp_path / "x.wav").samples).max() <= 2 / 32768


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused_in_one_sentence(name):
    content, refused = encoded(name, sound(name)), 0
    for place in np.linspace(17, len(content) - 1, 60).astype(int):
        try:
            read_clip("x", content=content[:place])
        except AudioError as error:
            assert re.fullmatch(
                r"x (ends too early|is damaged|has no samples|cannot be read)[^\n]*\.", str(error)
            )
            refused += 1
    # AMR and AAC have no header with a length, so a cut between two of their frames goes unnoticed. Their
    # frames have 13 and about 200 bytes here.
    assert refused == 60 if name not in ("amr", "aac") else refused >= 50


@pytest.mark.parametrize("name", ["m4a", "webm", "mov pcm"])
def test_a_channel_can_be_chosen_and_channels_that_cancel_are_refused(name):
    both = sound(name, 2)
    both[:, 1] *= 0.5
    content = encoded(name, both)
    left, right, mean = (
        np.abs(read_clip("x", content=content, channel=c).samples).max() for c in (0, 1, None)
    )
    assert (left, right, mean) == pytest.approx((0.3, 0.15, 0.225), abs=0.02)
    assert "the corpus or manifest names channel 2" in refusal(content, channel=2)
    inverted = sound("mov pcm", 2) * [1, -1]
    assert "cancel each other" in refusal(encoded("mov pcm", inverted))
    assert read_clip("x", content=encoded(name, 0 * both)).silent


def test_samples_far_above_full_scale_are_refused(monkeypatch):
    monkeypatch.setitem(FORMATS, "mov float", ("mov", "pcm_f32le", 16_000, {}))
    tone = make_tone(1.0)[:, None]
    assert np.abs(read_clip("x", content=encoded("mov float", tone)).samples).max() == pytest.approx(
        0.5, 1e-3
    )
    assert "has samples up to 5000, but full scale is 1" in refusal(encoded("mov float", 1e4 * tone))
    assert "not finite" in refusal(encoded("mov float", np.nan * tone))


@pytest.mark.parametrize("name", ["mp4", "mov", "mp4 in fragments"])
def test_a_video_gives_its_first_audio_track(name):
    clip = read_clip("x", content=encoded(name, sound(name), picture=True))
    assert clip.duration == pytest.approx(SECONDS, abs=0.05)
    assert np.abs(clip.samples).max() == pytest.approx(0.3, abs=0.05)


def test_a_video_without_sound_is_refused():
    content = encoded("mp4", np.zeros((0, 1), np.float32), picture=True)
    assert refusal(content) == "x has no audio track: there is nothing to transcribe."


def test_an_encrypted_file_is_refused():
    key = "00112233445566778899aabbccddeeff"
    content = encoded(
        "mp4", sound("mp4"), encryption_scheme="cenc-aes-ctr", encryption_key=key, encryption_kid=key
    )
    assert refusal(content) == "x is encrypted: save it without protection."


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".txt", ""])
def test_the_content_counts_and_not_the_name(tmp_path, suffix):
    path = tmp_path / f"recording{suffix}"
    path.write_bytes(encoded("m4a", sound("m4a")))
    assert read_clip(path).duration == pytest.approx(SECONDS, abs=1e-4)
    path.write_bytes(b"no audio" * 100)
    with pytest.raises(AudioError, match="cannot be read as wav, flac, ogg, opus, mp3, m4a, webm or another"):
        read_clip(path)


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile secret.wav\n",
        b"#EXTM3U\n#EXTINF:1,\nsecret.wav\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_a_list_that_names_other_files_or_addresses_is_not_followed(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    soundfile.write("secret.wav", make_tone(1.0), SAMPLE_RATE)
    (tmp_path / "x.m4a").write_bytes(content)
    with pytest.raises(AudioError, match=r"x\.m4a cannot be read"):
        read_clip("x.m4a")


def test_a_codec_that_is_not_listed_is_refused(monkeypatch):
    monkeypatch.setitem(FORMATS, "mkv mp2", ("matroska", "mp2", 48_000, {}))
    sentence = refusal(encoded("mkv mp2", sound("mkv mp2")))
    assert re.fullmatch(r"x has an audio track of a codec that is not read here \(mp2\w*\): .*", sentence)


def test_without_pyav_one_sentence_names_the_command(tmp_path, monkeypatch):
    path = tmp_path / "x.m4a"
    path.write_bytes(encoded("m4a", sound("m4a")))
    monkeypatch.setitem(sys.modules, "av", None)  # as Python marks a module that cannot be imported
    for read in (read_clip, count_samples):
        with pytest.raises(ConfigurationError, match=r"x\.m4a is MP4 or QuickTime.*run `pip install av`"):
            read(path)
    soundfile.write(tmp_path / "x.wav", make_tone(1.0), SAMPLE_RATE)
    assert read_clip(tmp_path / "x.wav").duration == 1.0


def test_segments_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "x.m4a"
    path.write_bytes(encoded("m4a", sound("m4a")))
    for read in (
        lambda: read_clip(path, start=0.2, duration=0.5),
        lambda: load_checked(path, None, start=0.0, duration=0.5),
    ):
        with pytest.raises(AudioError, match=r"no segment can be read .* convert it to flac"):
            read()


def test_a_file_that_is_too_long_is_refused_before_it_is_decoded():
    content = encoded("webm without length", sound("webm"))
    assert refusal(content, max_duration=1.0) == "x lasts 1.31 s, longer than 1 s."


@pytest.mark.parametrize("name", ["m4a", "caf"])
def test_a_damaged_file_has_the_length_0_so_that_the_others_are_transcribed(tmp_path, name):
    samples = sound("m4a")
    content = encoded("m4a", samples) if name == "m4a" else caf_with_aac(samples, SAMPLE_RATE)
    path = tmp_path / f"x.{name}"
    path.write_bytes(content[:-2000])
    assert count_samples(path) == 0


def test_tags_in_any_encoding_are_accepted():
    content = encoded("m4a", sound("m4a"))
    assert b"Lavf" in content
    assert read_clip("x", content=content.replace(b"Lavf", b"\xff\xfe\xfdf")).duration == pytest.approx(
        SECONDS, abs=1e-4
    )


def test_recordings_of_phones_and_browsers_are_a_corpus(tmp_path):
    for subset, name in (("train-a", "m4a"), ("dev-other", "webm without length"), ("test-c", "mp4")):
        path = tmp_path / "corpus" / subset / f"one.{name[:4].strip()}"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(name, sound(name), picture=name == "mp4"))
        path.with_suffix(".txt").write_text("words")
    done = build_manifest(load_recipe("librispeech"), str(tmp_path / "corpus"), str(tmp_path / "out"))
    for split in ("train", "dev", "test"):
        (utterance,) = read_manifest(done.file(f"{split}.jsonl"))
        samples = load_utterance(utterance)
        assert len(samples) == round(SECONDS * SAMPLE_RATE) == samples_of(utterance)


@pytest.mark.slow
def test_a_long_file_takes_little_more_memory_than_its_samples_at_16_khz(tmp_path):
    path = tmp_path / "long.m4a"
    path.write_bytes(repeated(encoded("m4a", sound("m4a", 2)), 1400))
    with peak_of_anonymous_memory() as peak:
        clip = read_clip(path)
    assert clip.duration > 1800
    # The samples are copied once. Decoded stereo at 44.1 kHz would be 5.5 times as large as they are.
    assert peak[0] < 2.5 * clip.samples.nbytes + 30e6
