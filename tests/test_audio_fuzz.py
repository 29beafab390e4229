"""A damaged audio file is refused in one sentence, or decodes to its original duration."""

import io
import os

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slam_asr.audio import AudioError, read_clip

SOAK = bool(os.environ.get("SLAM_ASR_SOAK"))
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


@st.composite
def damaged(draw, name: str) -> bytes:
    """The file with some of its bytes, most often of its header, replaced, removed or repeated."""
    content = bytearray(CONTENTS[name])
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.one_of(st.integers(0, 120), st.integers(0, len(content) - 1)))
        value = draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.builds(
                    lambda order, width, number: (
                        number.to_bytes(8, order)[:width]
                        if order == "little"
                        else number.to_bytes(8, order)[-width:]
                    ),
                    st.sampled_from(["little", "big"]),
                    st.sampled_from([1, 2, 4, 8]),
                    st.one_of(
                        st.sampled_from([0, 1, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]),
                        st.integers(0, 2 * len(content)),
                    ),
                ),
            )
        )
        action = draw(st.sampled_from(["replace", "replace", "replace", "cut", "append", "insert"]))
        if action == "replace":
            content[place : place + len(value)] = value
        elif action == "cut":
            del content[max(place, 1) :]
        elif action == "append":
            content += content[place:] if draw(st.booleans()) else value
        else:
            content[place:place] = value
        if not content:
            break
    return bytes(content)


def is_other_kind(content: bytes, name: str) -> bool:
    """Whether the header now describes other audio, whose duration may differ."""
    _, subtype, rate, channels = FORMATS[name]
    try:
        found = soundfile.info(io.BytesIO(content))
    except (soundfile.LibsndfileError, TypeError):
        return False
    return (found.subtype, found.samplerate, found.channels) != (subtype, rate, channels)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_audio_is_right_or_refused(name):
    original = read_clip(name, content=CONTENTS[name]).duration
    assert original == pytest.approx(SECONDS, abs=0.001)

    @settings(
        max_examples=3000 if SOAK else 25,
        deadline=None,
        database=None,
        derandomize=not SOAK,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(name))
    def check(content):
        try:
            duration = read_clip("x", max_duration=30.0, content=content).duration
        except AudioError as error:
            assert str(error).count(". ") == 0 and str(error).endswith(".") and "x" in str(error)
            return
        assert is_other_kind(content, name) or duration == pytest.approx(original, abs=0.02), (
            duration,
            original,
        )

    check()
