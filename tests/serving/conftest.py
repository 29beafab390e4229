"""Fixtures of the server's tests."""

from pathlib import Path

import pytest

from tests.conftest import make_tone, write_wav


@pytest.fixture
def tone(tmp_path) -> Path:
    return write_wav(tmp_path / "tone.wav", make_tone(1.5, frequency=500))
