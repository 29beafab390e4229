"""A damaged file of a phone or browser is refused in one sentence, or decodes to audio of limited length."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slam_asr.audio import SAMPLE_RATE, AudioError, read_clip
from tests.media import FORMATS, encoded
from tests.random_inputs import examples, within_a_second
from tests.test_audio_fuzz import damaged

SECONDS = 0.5
LONGEST = 30.0
"""Maximum duration in seconds that a file may announce. A damaged header may announce any duration; this
limit bounds the memory. The decoded audio may be longer than announced: the test allows twice the limit."""


def noise(rate: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (round(SECONDS * rate), 1)).astype(np.float32)


@st.composite
def damaged_at_either_end(draw, content: bytes) -> bytes:
    """Draw a damaged file. Half of the time, the damage is near the end, where MP4 has its tables."""
    if draw(st.booleans()):
        return draw(damaged(content))
    split = max(0, len(content) - 1500)
    return content[:split] + draw(damaged(content[split:]))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_media_decode_or_are_refused(name, capfd):
    content = encoded(name, noise(FORMATS[name][2]))

    @examples(20)
    @given(damaged_at_either_end(content))
    def check(damaged_content):
        try:
            with within_a_second():
                samples = read_clip("x", max_duration=LONGEST, content=damaged_content).samples
        except AudioError as error:
            assert re.fullmatch(r"[^\n]*\bx\b[^\n]*\.", str(error)) and ". " not in str(error)
            return
        assert samples.dtype == np.float32 and np.isfinite(samples).all()
        assert 0 < len(samples) <= 2 * LONGEST * SAMPLE_RATE

    check()
    assert capfd.readouterr().err == "", "ffmpeg writes its own messages"
