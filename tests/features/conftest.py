"""Manifests of short tones, for the tests of extraction."""

from pathlib import Path

import pytest

from slam_asr.artifacts.manifest import Utterance
from slam_asr.storage import sha256_of_file
from tests.conftest import make_tone, write_wav
from tests.utterances import write_manifest

LENGTHS = (0.1, 0.73, 1.0, 2.345)
"""Durations in seconds of the utterances in a small manifest."""


def utterances_in(folder: Path, lengths=LENGTHS, first=0) -> list[Utterance]:
    """Write a tone of each length in seconds; return the utterances, with keys k0, k1 …, from `first` on."""
    utterances = []
    for i, seconds in enumerate(lengths, start=first):
        wav = write_wav(folder / f"{i}.wav", make_tone(seconds, frequency=200 + 7 * i))
        utterances.append(
            Utterance(f"k{i}", str(wav), "text", round(seconds * 16000) / 16000, 16000, sha256_of_file(wav))
        )
    return utterances


@pytest.fixture
def many(tmp_path):
    """Write a manifest of fifty utterances. They fill five shards with the options `test_extract.SMALL`."""
    utterances = utterances_in(tmp_path / "audio", [0.2 + 0.01 * i for i in range(50)])
    write_manifest(tmp_path / "many.jsonl", utterances)
    return tmp_path / "many.jsonl"
