"""Audio of the worst utterances, small enough to be part of the report's page."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from slam_asr.audio import SAMPLE_RATE, AudioError
from slam_asr.progress import log_line
from slam_asr.scoring.metrics import Measured
from slam_asr.storage import write_atomically

AUDIO = "audio.jsonl"
LONGEST = 60.0
"""Seconds of one utterance that can be heard on the page."""

Name = tuple[str, str]
"""Key and subset of an utterance."""


def worst_first(measured: Measured) -> list[int]:
    """Numbers of the utterances in the order of the report: those that cost the total rate most first."""
    rows, errors, words = measured.rows, measured.errors.tolist(), measured.words.tolist()
    return sorted(range(len(rows)), key=lambda i: (-errors[i], words[i], rows[i].key, rows[i].subset))


def compress(samples: np.ndarray) -> bytes:
    """Samples [n] at 16 kHz as MP3, which every browser plays: about 3 kB a second."""
    content = io.BytesIO()
    soundfile.write(
        content,
        samples[: round(LONGEST * SAMPLE_RATE)],
        SAMPLE_RATE,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=0.9,
        bitrate_mode="VARIABLE",
    )
    return content.getvalue()


def listen_to(names: Iterable[Name], load: Callable[[Name], np.ndarray], megabytes: float) -> dict[Name, str]:
    """The audio of as many utterances as there is room for, as base64.

    Args:
        names: in order of importance.
        load: the samples of one; one whose audio cannot be read is left out, with a word.
        megabytes: room on the page.
    """
    heard: dict[Name, str] = {}
    left = megabytes * 1e6
    for name in names:
        try:
            text = base64.b64encode(compress(load(name))).decode()
        except AudioError as error:
            log_line(f"warning: the report cannot play {name[0]}: {error}")
            continue
        if len(text) > left:
            break
        heard[name] = text
        left -= len(text)
    return heard


def write_audio(folder: Path, heard: dict[Name, str]) -> None:
    """Leave audio for the report of a decoding that is done in parts."""
    write_atomically(
        folder / AUDIO,
        "".join(
            json.dumps({"key": key, "subset": subset, "mp3": text}) + "\n"
            for (key, subset), text in heard.items()
        ),
    )


def read_audio(files: Sequence[Path]) -> dict[Name, str]:
    """What `write_audio` left in the folders of all parts."""
    lines = [line for file in files for line in file.read_text().splitlines()]
    return {(row["key"], row["subset"]): row["mp3"] for row in map(json.loads, lines)}
