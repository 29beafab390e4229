"""Audio of the worst utterances, compressed to be embedded in the report's page."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from slam_asr.artifacts.word_errors import Measured
from slam_asr.audio import SAMPLE_RATE, AudioError
from slam_asr.progress import log_line
from slam_asr.storage import write_atomically

AUDIO = "audio.jsonl"
MAX_SECONDS = 60.0
"""Maximum length of an utterance's audio on the page, in seconds; the rest is cut off."""

Name = tuple[str, str]
"""Key and subset of an utterance."""


def worst_first(measured: Measured) -> list[int]:
    """Indices of the utterances in the order of the report: those with the most errors first."""
    rows, errors, words = measured.rows, measured.errors.tolist(), measured.words.tolist()
    # Among utterances with equally many errors, the shortest reference has the highest rate and comes first.
    return sorted(range(len(rows)), key=lambda i: (-errors[i], words[i], rows[i].key, rows[i].subset))


def compress(samples: np.ndarray) -> bytes:
    """Encode float32 samples [n] at 16 kHz as MP3, which every browser plays; a second takes about 3 kB."""
    content = io.BytesIO()
    shown = samples[: round(MAX_SECONDS * SAMPLE_RATE)]
    quality = {"compression_level": 0.9, "bitrate_mode": "VARIABLE"}
    soundfile.write(content, shown, SAMPLE_RATE, "MPEG_LAYER_III", format="MP3", **quality)
    return content.getvalue()


def encode_audio(
    names: Iterable[Name], load: Callable[[Name], np.ndarray], megabytes: float
) -> dict[Name, str]:
    """Encode the audio of as many utterances as fit on the page, as MP3 in base64.

    Args:
        names: the utterances, most important first.
        load: reads the float32 samples [n] of one utterance at 16 kHz. If it raises AudioError, the utterance
            is skipped with a warning.
        megabytes: maximum size of all audio together, in MB after base64 encoding.

    Returns:
        The audio of the utterances before the first that does not fit, as MP3 in base64.
    """
    encoded: dict[Name, str] = {}
    remaining = megabytes * 1e6
    for name in names:
        try:
            text = base64.b64encode(compress(load(name))).decode()
        except AudioError as error:
            log_line(f"warning: the report cannot play {name[0]}: {error}")
            continue
        if len(text) > remaining:
            break
        encoded[name] = text
        remaining -= len(text)
    return encoded


def write_audio(folder: Path, encoded: dict[Name, str]) -> None:
    """Save a work shard's audio for the report of the complete decoding."""
    rows = [{"key": key, "subset": subset, "mp3": text} for (key, subset), text in encoded.items()]
    write_atomically(folder / AUDIO, "".join(json.dumps(row) + "\n" for row in rows))


def read_audio(files: Sequence[Path]) -> dict[Name, str]:
    """Read what `write_audio` saved in the folders of all work shards."""
    # `splitlines` is safe here: `write_audio` escapes all characters that are not ASCII.
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {(row["key"], row["subset"]): row["mp3"] for row in map(json.loads, lines)}
