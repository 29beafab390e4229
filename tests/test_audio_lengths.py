"""All samples of an audio file are decoded; a file with fewer or more than it announces is refused."""

import io
import struct

import numpy as np
import pytest
import soundfile

from slam_asr.audio import SAMPLE_RATE, AudioError, Clip, count_samples, read_clip
from slam_asr.audio.mp3 import find_frames
from tests.conftest import make_tone

CONTAINERS = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "SVX"]
CODECS = {"FLAC": "PCM_16", "OGG": "VORBIS", "OPUS": "OPUS", "MP3": "MPEG_LAYER_III"}
MODES = [("CONSTANT", 0.99), ("VARIABLE", 0.1), ("AVERAGE", 0.5)]


def noise(seconds: float, rate: int = 8_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def encoded(container: str, samples: np.ndarray, rate: int = 8_000, **options) -> bytes:
    buffer = io.BytesIO()
    subtype = CODECS.get(container)
    soundfile.write(
        buffer, samples, rate, format="OGG" if container == "OPUS" else container, subtype=subtype, **options
    )
    return buffer.getvalue()


def read(content: bytes, **options) -> Clip:
    return read_clip("x", content=content, **options)


def refusal(content: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.real_input("B02-more-than-the-header")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_files_that_were_joined_are_decoded_to_the_end(tmp_path, codec, on_disk):
    parts = [encoded(codec, noise(seconds, seed=round(10 * seconds))) for seconds in (0.5, 0.3, 0.5)]
    expected = np.concatenate([read(part).samples for part in parts])
    joined = b"".join(parts)
    path = tmp_path / "joined"
    path.write_bytes(joined)
    clip = read_clip(path) if on_disk else read(joined)
    assert len(clip.samples) == round(1.3 * SAMPLE_RATE) == count_samples(path)
    # At the joints, the resampler has neighbouring samples that it lacks at the ends of the single parts.
    away = [i for i in range(0, len(expected), 50) if min(abs(i - 8000), abs(i - 12_800)) > 400]
    assert np.abs(clip.samples - expected)[away].max() < 1e-3
    segment = read_clip(path, start=0.4, duration=0.5).samples
    assert np.abs(segment[400:-400] - clip.samples[6_800:14_000]).max() < 2e-3


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_holds_more_than_its_header_announces_is_refused(container):
    content = encoded(container, noise(0.5))
    assert read(content).duration == 0.5
    assert "holds more than its header announces (4000 more bytes)" in refusal(content + content[-4000:])
    assert "holds more than its header announces" in refusal(content + content), "a second file is appended"


@pytest.mark.real_input("B02-more-than-the-header")
def test_a_length_that_is_too_small_is_refused_in_wav_and_flac():
    content = bytearray(encoded("WAV", noise(0.5)))
    length_offset = content.index(b"data") + 4
    content[length_offset : length_offset + 4] = struct.pack("<I", 2000)
    assert "holds more than its header announces (6000 more bytes)" in refusal(bytes(content))
    content = bytearray(encoded("FLAC", noise(0.5)))
    content[22:26] = struct.pack(">I", 1000)
    assert "(4000 samples instead of 1000)" in refusal(bytes(content))


@pytest.mark.real_input("B13-cut-off")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("missing", [3, 2000])
def test_a_file_that_was_cut_off_is_refused(container, missing):
    content = encoded(container, noise(0.5))
    assert "ends too early" in refusal(content[:-missing])


def test_the_missing_end_of_a_file_of_gigabytes_is_noticed_if_its_length_has_64_bits():
    content = bytearray(encoded("RF64", noise(0.5)))
    long_offset = content.index(b"ds64") + 16
    content[long_offset : long_offset + 8] = struct.pack("<Q", 5 * 2**30)
    # The length in ds64 counts only if the data chunk itself names none.
    length_offset = content.index(b"data") + 4
    content[length_offset : length_offset + 4] = b"\xff" * 4
    assert "ends too early" in refusal(bytes(content))


def test_a_damaged_file_has_a_length_so_that_batches_with_other_files_can_be_planned(tmp_path):
    (tmp_path / "x.wav").write_bytes(encoded("WAV", noise(0.5))[:-2000])
    assert count_samples(tmp_path / "x.wav") == 6_000


@pytest.mark.parametrize("container", [*CONTAINERS, "FLAC", "MP3"])
@pytest.mark.parametrize("end", [b"TAG" + bytes(125), bytes(2000), b"\n"])
def test_tags_and_padding_may_follow_the_samples(container, end):
    assert read(encoded(container, noise(0.5)) + end).duration == 0.5


def test_a_length_that_is_left_open_means_the_end_of_the_file():
    content = bytearray(encoded("AU", noise(0.5)))
    content[8:12] = b"\xff" * 4
    assert read(bytes(content)).duration == 0.5


@pytest.mark.real_input("B23-segments-of-mp3")
@pytest.mark.parametrize("rate,channels", [(16_000, 1), (24_000, 2), (44_100, 2)])
@pytest.mark.parametrize("mode,level", MODES)
def test_a_segment_of_an_mp3_is_exact_and_needs_little_of_the_file(rate, channels, mode, level, capfd):
    t = np.arange(3 * rate) / rate
    sound = (
        noise(3.0, rate, channels)
        if mode == "AVERAGE"
        else np.tile(0.4 * np.sin(2 * np.pi * (300 + 200 * t) * t)[:, None], channels)
    )
    content = encoded("MP3", sound.astype(np.float32), rate, bitrate_mode=mode, compression_level=level)
    file = find_frames(content)
    (part,) = file.parts
    complete, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    # Without an encoder's header, libsndfile only estimates the length.
    length = file.samples_of(part)
    assert length >= len(complete) if mode == "CONSTANT" else length == len(complete) == 3 * rate
    stream = io.BytesIO(content)
    for first in (0, 5_000, 2 * rate, length - 2_000):
        stretch = file.read(part, stream, first, 2_000)
        expected = complete[first : first + 2_000]
        assert len(stretch) == 2_000
        # The last bit of the decoder's sums depends on the phase of its filter bank.
        assert np.abs(stretch[: len(expected)] - expected).max() < 3e-7

    class Counting(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            self.taken += size
            return super().read(size)

    counting = Counting(content)
    file.read(part, counting, 2 * rate, 2_000)
    assert 0 < counting.taken < len(content) * 0.2 + 2_000
    assert capfd.readouterr().err == "", "the decoder complains of frames without their reservoir"


def test_an_mp3_without_an_encoders_header_is_decoded_to_its_end():
    # libsndfile estimates the length from the first frames, whose bit rate is higher, because they are noise.
    quiet = np.zeros((16_000, 1), np.float32)
    content = encoded(
        "MP3", np.concatenate([noise(0.5), quiet, noise(0.5)]), bitrate_mode="VARIABLE", compression_level=0.1
    )
    frames = find_frames(content).parts[0].offsets
    headless = content[frames[0] :]
    assert soundfile.info(io.BytesIO(headless)).frames < 24_000
    assert len(read(headless).samples) == 2 * 576 * (len(frames) - 1)


def test_a_flac_whose_first_metadata_block_has_a_wrong_size_is_refused():
    content = bytearray(encoded("FLAC", noise(0.5)))
    content[7:9] = b")\xf1"
    assert "cannot be read" in refusal(bytes(content)) or "is damaged" in refusal(bytes(content))


def test_a_damaged_mp3_is_refused():
    content = encoded("MP3", noise(1.0))
    offsets = find_frames(content).parts[0].offsets
    middle = offsets[len(offsets) // 2]
    assert "changes its sample rate" in refusal(content + encoded("MP3", noise(0.5, 16_000), 16_000))
    assert "changes its sample rate" in refusal(content + encoded("MP3", noise(0.5, channels=2)))
    assert "bytes between two frames are not audio" in refusal(content[:middle] + b"junk" + content[middle:])
    assert "ends too early" in refusal(content[:-3])
    assert "ends too early" in refusal(content[: offsets[-4]]), "three frames are missing"
    assert "ends too early" in refusal(content[offsets[0] : -3]), "there is no count of frames"
    assert "the last 5000 bytes are not audio" in refusal(content + b"x" * 5000)


@pytest.mark.parametrize("container", ["FLAC", "OGG"])
def test_joined_files_with_different_rates_are_refused_when_their_length_is_counted(container, tmp_path):
    path = tmp_path / "joined"
    path.write_bytes(encoded(container, noise(0.5)) + encoded(container, noise(0.5, 16_000), 16_000))
    for call in (count_samples, read_clip):
        with pytest.raises(AudioError, match="changes its sample rate or number of channels"):
            call(path)


@pytest.mark.parametrize("scale", [128.0, 32768.0])
def test_float_samples_far_above_full_scale_are_refused(scale):
    assert "but full scale is 1" in refusal(_float(noise(0.5) * scale))
    assert read(_float(noise(0.5) * 8)).duration == 0.5, "clipping and loud mastering stay below 4"


def _float(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_channels_that_cancel_are_refused_and_silence_is_marked():
    sound = noise(0.5)
    inverted = np.concatenate([sound, -0.995 * sound], axis=1)
    assert "cancel each other" in refusal(encoded("WAV", inverted))
    left = read(encoded("WAV", inverted), channel=0).samples
    assert np.array_equal(left, read(encoded("WAV", sound)).samples)
    half = np.concatenate([sound, 0 * sound], axis=1)
    assert not read(encoded("WAV", half)).silent
    assert read(encoded("WAV", 0 * half)).silent and read(_float(0 * sound + 0.25)).silent
    assert not read(encoded("WAV", sound * 0.001)).silent


def test_the_named_channel_is_used():
    left, right = make_tone(0.5, 16_000, 300), make_tone(0.5, 16_000, 700)
    content = encoded("WAV", np.stack([left, right], 1), 16_000)
    for channel, expected in enumerate((left, right)):
        assert np.abs(read(content, channel=channel).samples - expected).max() < 1e-4
    with pytest.raises(AudioError, match="but the corpus or manifest names channel 2") as caught:
        read(content, channel=2)
    assert caught.value.reason == "no such channel"
