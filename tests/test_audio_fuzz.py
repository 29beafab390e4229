"""A damaged audio file is refused in one sentence, or decodes to its original duration."""

import io
import re

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from slam_asr.audio import AudioError, read_clip
from tests.random_inputs import examples, within_a_second

FORMATS = {
    "wav": ("WAV", "PCM_16", 16_000, 1),
    "wav float stereo": ("WAV", "FLOAT", 8_000, 2),
    "wavex": ("WAVEX", "PCM_24", 8_000, 1),
    "rf64": ("RF64", "PCM_16", 8_000, 1),
    "w64": ("W64", "PCM_16", 8_000, 1),
    "aiff": ("AIFF", "PCM_16", 8_000, 1),
    "au": ("AU", "ULAW", 8_000, 1),
    "caf": ("CAF", "PCM_16", 8_000, 1),
    "sph": ("NIST", "PCM_16", 8_000, 1),
    "flac": ("FLAC", "PCM_16", 8_000, 1),
    "ogg": ("OGG", "VORBIS", 8_000, 1),
    "opus": ("OGG", "OPUS", 8_000, 1),
    "mp3": ("MP3", "MPEG_LAYER_III", 16_000, 1),
    "mp3 stereo": ("MP3", "MPEG_LAYER_III", 44_100, 2),
}
SECONDS = 0.5


def encoded(name: str) -> bytes:
    container, subtype, rate, channels = FORMATS[name]
    noise = np.random.default_rng(0).normal(0, 0.1, (round(SECONDS * rate), channels)).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format=container, subtype=subtype)
    return buffer.getvalue()


CONTENTS = {name: encoded(name) for name in FORMATS}


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]), st.integers(0, 50_000)
)


def as_field(number: int, width: int, little: bool) -> bytes:
    return number.to_bytes(8, "little")[:width] if little else number.to_bytes(8, "big")[-width:]


FIELDS = st.builds(as_field, NUMBERS, st.sampled_from([1, 2, 4, 8]), st.booleans())


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Draw a damaged file: bytes are replaced, inserted, cut off or appended, most often in the header."""
    place = draw(st.one_of(st.integers(0, 120), st.integers(0, len(content) - 1)))
    value = draw(st.one_of(st.binary(min_size=1, max_size=8), FIELDS))
    damage = draw(st.sampled_from(["replace", "replace", "replace", "insert", "cut", "append"]))
    if damage == "cut":
        return content[: max(place, 1)]
    if damage == "append":
        return content + value
    after = place + len(value) if damage == "replace" else place
    return content[:place] + value + content[after:]


def is_other_audio(content: bytes, name: str) -> bool:
    """Return whether the header now describes another kind of audio, whose duration may differ."""
    _, subtype, rate, channels = FORMATS[name]
    try:
        found = soundfile.info(io.BytesIO(content))
    except (soundfile.LibsndfileError, TypeError):
        return False
    return (found.subtype, found.samplerate, found.channels) != (subtype, rate, channels)


def tolerance(content: bytes, name: str) -> float:
    """Return the seconds by which the duration may differ unnoticed: 128 bytes of samples, or two mp3 frames.

    In an mp3, only the encoder's header states how many samples of the first and the last frames are not part
    of the recording. Both numbers are below 4096.
    """
    rate = FORMATS[name][2]
    if not name.startswith("mp3"):
        return 0.017
    header_is_intact = content[:200] == CONTENTS[name][:200]
    return 0.001 + (2 * 1152 + (0 if header_is_intact else 2 * 4096)) / rate


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_audio_has_its_duration_or_is_refused(name):
    original = read_clip(name, content=CONTENTS[name]).duration
    assert original == pytest.approx(SECONDS, abs=0.001)

    @examples(20)
    @given(damaged(CONTENTS[name]))
    def check(content):
        try:
            with within_a_second():
                duration = read_clip("x", max_duration=30.0, content=content).duration
        except AudioError as error:
            assert re.fullmatch(r"[^\n]*\bx\b[^\n]*\.", str(error)) and ". " not in str(error)
            return
        expected = pytest.approx(original, abs=tolerance(content, name))
        assert duration == expected or is_other_audio(content, name)

    check()
