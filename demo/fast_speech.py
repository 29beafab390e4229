"""Generate hours of training speech within minutes, all by one natural voice.

    pip install hibari-tts==0.2.1 onnxruntime soundfile soxr
    python -m demo.fast_speech --text transcripts.txt --hours 10 --out fast

The package hibari-tts contains a small copy of Kokoro's voice af_heart, which makes about 90 seconds of
speech per second on one core. Such speech teaches a projector words, not voices. Twenty utterances each share
a pitch and a pace, and most have echo or noise, but all come from one voice. For many voices, see
make_speech.py.

The text is a file of lines `<chapter>-<number> TEXT`. Successive lines of a chapter are joined to utterances
of 20 to 62 words, because Whisper needs as much time to encode one second as to encode thirty. The files have
LibriSpeech's layout, in a subset `train-fast`. A repeated command writes the speakers that are missing.
"""

import argparse
import importlib.util
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from demo.acoustics import VARIED, disturb, trim
from demo.kokoro import SAMPLE_RATE
from demo.make_speech import in_parallel
from demo.texts import read_chapters

HIBARI_RATE = 24_000
WORDS = (20, 62)
"""Minimum and maximum number of words of an utterance."""
WORDS_PER_SECOND = 2.7
LONGEST = 29.5
"""Seconds; Whisper encodes up to thirty."""
UTTERANCES_PER_SPEAKER = 20
FIRST_SPEAKER = 400_001
PITCHES, PACES, PAUSES = (0.80, 1.15), (0.85, 1.25), (0.05, 0.3)
"""Ranges of a speaker's pitch and pace, relative to the voice's own, and of the seconds between lines."""
SPEAKER_STREAM, UTTERANCE_STREAM = 11, 12
"""First numbers of the seeds of random numbers for speakers, and for utterances."""

VOICE: list[Any] = []  # a worker's synthesiser


def utterances(path: Path, hours: float, seed: int) -> list[list[str]]:
    """Choose the texts: for each utterance its lines, in random order, as many as give these hours.

    Raises:
        ValueError: there is no such file, it has no text of such a length, or the hours are not positive.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give one with lines `<chapter>-<number> TEXT`")
    if not hours > 0:
        raise ValueError(f"--hours {hours} is not positive")
    texts = [joined for lines in read_chapters(path) for joined in _join(lines)]
    if not texts:
        raise ValueError(f"{path} gives no text of {WORDS[0]} to {WORDS[1]} words in a chapter")
    random.Random(seed).shuffle(texts)
    chosen, words = [], hours * 3600 * WORDS_PER_SECOND
    for text in texts:
        if words <= 0:
            break
        chosen.append(text)
        words -= sum(len(line.split()) for line in text)
    return chosen


def _join(lines: list[str]) -> Iterator[list[str]]:
    """Join successive lines, and yield those joined lines whose number of words is within WORDS."""
    joined: list[str] = []
    for line in [*lines, None]:
        words = sum(len(one.split()) for one in joined)
        if line is None or (joined and words + len(line.split()) > WORDS[1]):
            if WORDS[0] <= words <= WORDS[1]:
                yield joined
            joined = []
        joined = joined if line is None else [*joined, line]


def speak(out: Path, task: tuple[int, list[list[str]]]) -> float:
    """Write the utterances of a speaker, and return their seconds.

    Args:
        out: folder of the subset.
        task: the speaker's position, from 0, and the lines of each utterance.
    """
    position, texts = task
    name = f"{FIRST_SPEAKER + position}-1"
    folder = out / str(FIRST_SPEAKER + position) / "1"
    transcript = folder / f"{name}.trans.txt"
    if transcript.exists():
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([SPEAKER_STREAM, position])
    pitch, pace = rng.uniform(*PITCHES), rng.uniform(*PACES)
    seconds, lines = 0.0, []
    for index, text in enumerate(texts):
        samples = _utterance(text, pitch, pace, np.random.default_rng([UTTERANCE_STREAM, position, index]))
        if len(samples) > LONGEST * SAMPLE_RATE:
            continue
        soundfile.write(folder / f"{name}-{index:04d}.flac", samples, SAMPLE_RATE)
        seconds += len(samples) / SAMPLE_RATE
        lines.append(f"{name}-{index:04d} {' '.join(text).upper()}\n")
    transcript.write_text("".join(lines), encoding="utf-8")
    return seconds


def _utterance(lines: list[str], pitch: float, pace: float, rng: np.random.Generator) -> np.ndarray:
    """Speak lines with short pauses between them: float32 [samples] at SAMPLE_RATE Hz."""
    speed = float(np.clip(pace * rng.uniform(0.94, 1.06) / pitch, 0.55, 1.9))
    own_pitch = pitch * rng.uniform(0.97, 1.03)
    parts = []
    for line in lines:
        samples = np.asarray(VOICE[0](f"{line}.", speed=speed, seed=int(rng.integers(1 << 30))), np.float32)
        pause = np.zeros(int(SAMPLE_RATE * rng.uniform(*PAUSES)), np.float32)
        parts += [soxr.resample(samples, HIBARI_RATE * own_pitch, SAMPLE_RATE), pause]
    return disturb(trim(np.concatenate(parts)), VARIED, rng)


def start_worker() -> None:
    """Load a worker's synthesiser."""
    from hibari import Hibari

    VOICE.append(Hibari())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.fast_speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="file of lines `<chapter>-<number> TEXT`")
    parser.add_argument("--hours", type=float, required=True, help="approximate hours of speech")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to continue")
    parser.add_argument("--seed", type=int, default=7, help="order of the texts (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        texts = utterances(args.text, args.hours, args.seed)
        if importlib.util.find_spec("hibari") is None:
            raise ValueError("the package hibari-tts is missing: install what demo/README.md names")
        starts = range(0, len(texts), UTTERANCES_PER_SPEAKER)
        tasks = [(n, texts[start : start + UTTERANCES_PER_SPEAKER]) for n, start in enumerate(starts)]
        in_parallel(partial(speak, args.out / "train-fast"), tasks, args.workers, start_worker)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
