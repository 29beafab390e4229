"""Real audio, made by hand, and the real speech where it lies beside the repository."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

LIBRI_MINI = Path(__file__).resolve().parents[2] / "shared" / "speech" / "libri-mini"


@pytest.fixture(scope="session")
def libri_mini() -> Path:
    """Two hours of LibriSpeech: train-clean-100 and test-other as they come from the archive."""
    if not LIBRI_MINI.is_dir():
        pytest.skip("libri-mini is not there")
    return LIBRI_MINI


def make_tone(seconds: float = 1.0, rate: int = 16_000, frequency: float = 440.0, channels: int = 1) -> np.ndarray:
    """A sine: float32 [samples], or [samples, channels] for more than one channel."""
    tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    return tone if channels == 1 else np.stack([tone] * channels, axis=1)


def write_wav(path: Path, samples: np.ndarray | None = None, rate: int = 16_000, **options: str) -> Path:
    """Write samples (a second's tone if none are given) as the kind of file that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"} | options
    soundfile.write(path, make_tone() if samples is None else samples, rate, **options)
    return path


def write_librispeech(root: Path, subsets: dict[str, dict[str, str]], suffix: str = ".wav") -> Path:
    """A LibriSpeech tree: transcripts by id by subset, and a tone of its own for each id."""
    for subset, texts in subsets.items():
        for index, (key, text) in enumerate(texts.items()):
            speaker, chapter, _ = key.split("-")
            folder = root / subset / speaker / chapter
            frequency = 200 + 10 * index + sum(map(ord, subset)) % 100
            write_wav(folder / (key + suffix), make_tone(0.5 + 0.01 * index, frequency=frequency))
            with open(folder / f"{speaker}-{chapter}.trans.txt", "a") as file:
                file.write(f"{key} {text}\n")
    return root
