"""Generate many hours of speech for training a projector: synthetic speech, and augmented real speech.

    python make_training_speech.py --text transcripts.txt --real LibriSpeech/train-clean-100 --out speech

`transcripts.txt` has lines `<key> TEXT IN CAPITALS`, like LibriSpeech's transcripts. Excerpts of its lines, 3
to 32 words long, are spoken by espeak-ng and flite with random accents, variants, pitches and paces, and
joined into utterances of up to 20 s. Utterances of `--real`, a folder in LibriSpeech's layout, are written
unchanged and in `--copies` copies at other speeds, which change pace and pitch. Echo and noise are added to
most synthetic utterances and most copies, but never to the unchanged ones. Every twentieth chapter of the
real speech is held out for validation.

    <out>/train-synthetic/<speaker>/1/<speaker>-1-<NNNN>.flac               and a .trans.txt next to the audio
    <out>/train-real/<speaker>/<chapter>/<speaker>-<chapter>-<NNNN>.flac    copy n has chapter + 1 000 000 n
    <out>/dev-real/                                                         the same, without copies

Needs `espeak-ng` and `flite` on the PATH, and the Python packages numpy, soundfile and soxr.
"""

import argparse
import multiprocessing
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from make_speech import SAMPLE_RATE, Speaker, speak

ACCENTS = (
    "en-us",
    "en-us",
    "en-us",
    "en-us-nyc",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
)
VARIANTS = (
    "",
    *(f"+f{n}" for n in range(1, 6)),
    *(f"+m{n}" for n in range(1, 9)),
    "+adam",
    "+belinda",
    "+david",
    "+ed",
    "+linda",
    "+paul",
    "+pedro",
    "+rob",
    "+sandro",
    "+steph",
    "+victor",
    "+zac",
    "+Andy",
    "+Annie",
    "+Gene",
    "+Lee",
    "+Marco",
    "+klatt",
    "+klatt2",
    "+klatt4",
)
FLITE = ("kal16", "awb", "rms", "slt")
"""Voices of flite; three of them were built from recordings of people."""
VOICES, EACH = 600, 15
"""Number of synthetic speakers per seed, and the number of excerpts that each of them speaks."""
PAUSE = (0.1, 0.5)
"""Shortest and longest pause between joined excerpts, in seconds."""
JOINED = (1.5, 20.0)
"""Range of the durations of joined excerpts, in seconds.

Long utterances are encoded more efficiently, because Whisper needs as much time for one second as for thirty.
"""
FLITE_SHARE = 0.4
"""Share of synthetic speakers with a voice of flite."""
WORDS = (3, 32)
"""Fewest and most words of an excerpt."""
SPEEDS = (0.88, 1.12)
"""Range of factors by which speech is sped up."""
HELD_OUT = 20
"""One chapter in this many is held out for validation."""


def draw_speaker(number: int, rng: random.Random) -> Speaker:
    """Choose a random synthetic voice."""
    if rng.random() < FLITE_SHARE:
        return Speaker(number, "flite", rng.choice(FLITE), rng.uniform(0.8, 1.15))
    return Speaker(
        number,
        "espeak-ng",
        rng.choice(ACCENTS) + rng.choice(VARIANTS),
        rng.uniform(130, 210),
        rng.randint(20, 80),
    )


def draw_excerpt(words: list[str], rng: random.Random) -> list[str]:
    """Choose a random excerpt of consecutive words; the logarithm of its length is uniformly distributed."""
    low, high = WORDS
    length = min(len(words), round(low * (high / low) ** rng.random()))
    start = rng.randrange(len(words) - length + 1)
    return words[start : start + length]


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Change the speed, and with it the pitch, of float32 [samples] at 16 kHz; 2 halves the duration."""
    return soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE)


def disturb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add echo (with probability 0.33) and coloured noise (0.75), and scale to a random peak.

    Args:
        samples: float32 [samples] at 16 kHz.
        rng: the source of randomness.

    Returns:
        float32 [samples], as many as given. The signal-to-noise ratio is 8 to 40 dB.
    """
    if rng.random() < 0.33:
        decay = rng.uniform(0.05, 0.4)  # seconds until the echo has decayed by 60 dB
        times = np.arange(round(decay * SAMPLE_RATE)) / SAMPLE_RATE
        echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / decay) * rng.uniform(0.02, 0.15)
        echo[0] = 1.0
        # The FFT convolves in a circle: with this size, the end of the echo does not return to the start.
        size = len(samples) + len(echo)
        samples = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(echo, size), size)[: len(samples)]
    if rng.random() < 0.75:
        spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
        # The amplitude falls with the frequency to a random power, from white noise (0) to brown noise (1).
        # Below 20 Hz, 1/400 of the spectrum's 8 kHz, the divisor is constant.
        spectrum /= np.maximum(np.arange(len(spectrum)), len(spectrum) / 400) ** rng.uniform(0.0, 1.0)
        noise = np.fft.irfft(spectrum, len(samples))
        level = np.sqrt(np.mean(samples**2) / max(np.mean(noise**2), 1e-12))
        samples = samples + noise * level * 10 ** (-rng.uniform(8, 40) / 20)
    return (samples * (rng.uniform(0.1, 0.9) / max(np.abs(samples).max(), 1e-6))).astype(np.float32)


def write(folder: Path, speaker: str, chapter: int, utterances: Iterable[tuple[str, np.ndarray]]) -> float:
    """Write a chapter in LibriSpeech's layout, and return its seconds of speech.

    Args:
        folder: the subset's folder.
        speaker: the speaker's number.
        chapter: the chapter's number.
        utterances: texts with their audio, float32 [samples] at 16 kHz.
    """
    chapter_folder = folder / speaker / str(chapter)
    chapter_folder.mkdir(parents=True)
    lines, seconds = [], 0.0
    for number, (text, samples) in enumerate(utterances):
        key = f"{speaker}-{chapter}-{number:04d}"
        soundfile.write(chapter_folder / f"{key}.flac", samples, SAMPLE_RATE)
        lines.append(f"{key} {text}\n")
        seconds += len(samples) / SAMPLE_RATE
    (chapter_folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return seconds


def synthesise(task: tuple[Path, int, list[list[str]], tuple[float, float], int]) -> float:
    """Synthesise all excerpts of a speaker, joined into utterances, and return the seconds of speech.

    Args:
        task: the subset's folder, the speaker's number, the excerpts, the range of durations in seconds, and
            the seed.
    """
    folder, number, excerpts, durations, seed = task
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    speaker = draw_speaker(number, rng)
    own_speed = rng.uniform(*SPEEDS)  # so that speakers with the same voice of flite differ
    with tempfile.TemporaryDirectory() as scratch:
        speech = [
            disturb(at_speed(speak(speaker, " ".join(words).lower(), Path(scratch)), own_speed), noise)
            for words in excerpts
        ]
    return write(
        folder, str(number), 1, join(speech, [" ".join(words) for words in excerpts], durations, rng)
    )


def join(
    speech: list[np.ndarray], texts: list[str], durations: tuple[float, float], rng: random.Random
) -> Iterator[tuple[str, np.ndarray]]:
    """Join consecutive excerpts, with pauses, into utterances of random durations.

    Args:
        speech: the audio of each excerpt, float32 [samples] at 16 kHz.
        texts: the text of each excerpt.
        durations: range of the utterances' durations, in seconds. An excerpt is never cut.
        rng: the source of randomness.

    Yields:
        The text and the audio of each utterance.
    """
    low, high = durations
    i = 0
    while i < len(speech):
        length = low * (high / low) ** rng.random() * SAMPLE_RATE
        samples, words = speech[i], [texts[i]]
        i += 1
        while i < len(speech) and len(samples) + len(speech[i]) < length:
            samples = np.concatenate(
                [samples, np.zeros(round(rng.uniform(*PAUSE) * SAMPLE_RATE), np.float32), speech[i]]
            )
            words.append(texts[i])
            i += 1
        yield " ".join(words), samples


def copy_chapter(task: tuple[Path, Path, int, int]) -> float:
    """Write a chapter of real speech, unchanged or augmented, and return its seconds of speech.

    Args:
        task: the subset's folder, the chapter's .trans.txt, the number of the copy (0: unchanged), and the
            seed.
    """
    folder, transcript, copy, seed = task
    noise = np.random.default_rng(seed)
    speaker, chapter = transcript.name.removesuffix(".trans.txt").split("-")
    utterances = []
    for line in transcript.read_text(encoding="utf-8").splitlines():
        key, _, text = line.partition(" ")
        samples, _ = soundfile.read(transcript.parent / f"{key}.flac", dtype="float32")
        utterances.append(
            (text, disturb(at_speed(samples, noise.uniform(*SPEEDS)), noise) if copy else samples)
        )
    return write(folder, speaker, int(chapter) + 1_000_000 * copy, utterances)


def in_parallel(work: Callable, tasks: list, name: str) -> None:
    """Call `work` for each task, on all cores, and print the number of chapters and their hours of speech."""
    with multiprocessing.Pool() as pool:
        seconds = sum(pool.imap_unordered(work, tasks))
    print(f"{name:16} {len(tasks):6} chapters {seconds / 3600:7.2f} h", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="lines `<key> TEXT`")
    parser.add_argument("--real", type=Path, help="folder of real speech in LibriSpeech's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist yet")
    parser.add_argument(
        "--voices",
        type=int,
        default=VOICES,
        help=f"synthetic speakers, up to {VOICES} (default: %(default)s)",
    )
    parser.add_argument(
        "--each",
        type=int,
        default=EACH,
        help="number of excerpts that each synthetic speaker speaks (default: %(default)s)",
    )
    parser.add_argument(
        "--joined",
        type=float,
        nargs=2,
        default=JOINED,
        metavar=("SHORTEST", "LONGEST"),
        help="range of durations in seconds to which excerpts are joined (default: %(default)s)",
    )
    parser.add_argument(
        "--first-voice",
        type=int,
        default=1,
        help="number of the first synthetic speaker, so that the results of several runs can form one corpus "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=2,
        help="augmented copies of each real utterance (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"there is no file {args.text}: give one with lines `<key> TEXT`")
    if args.out.exists():
        parser.error(f"{args.out} exists already: choose another folder")
    if args.real and not any(args.real.rglob("*.trans.txt")):
        parser.error(f"{args.real} holds no .trans.txt: give a folder in LibriSpeech's layout")
    missing = [program for program in ("espeak-ng", "flite") if args.voices and not shutil.which(program)]
    if missing:
        parser.error(f"{missing[0]} is not on the PATH: run `apt-get install espeak-ng flite`")

    rng = random.Random(args.seed)
    lines = [
        words
        for line in args.text.read_text(encoding="utf-8").splitlines()
        if len(words := line.split()[1:]) >= WORDS[0]
    ]
    if not lines:
        parser.error(f"{args.text} has no line `<key> TEXT` with {WORDS[0]} words or more")
    # Excerpts are drawn for all `VOICES`, so that those of a speaker do not depend on --voices.
    excerpts = [draw_excerpt(rng.choice(lines), rng) for _ in range(VOICES * args.each)]
    args.out.mkdir(parents=True)
    tasks = [
        (
            args.out / "train-synthetic",
            100_000 + args.first_voice + n,
            excerpts[n::VOICES],
            tuple(args.joined),
            args.seed + n,
        )
        for n in range(args.voices)
    ]
    in_parallel(synthesise, tasks, "train-synthetic")
    if args.real:
        chapters = sorted(args.real.rglob("*.trans.txt"))
        held_out = chapters[HELD_OUT // 2 :: HELD_OUT]
        in_parallel(copy_chapter, [(args.out / "dev-real", t, 0, 0) for t in held_out], "dev-real")
        copies = [(copy, t) for copy in range(args.copies + 1) for t in chapters if t not in held_out]
        in_parallel(
            copy_chapter,
            [(args.out / "train-real", t, copy, args.seed + n) for n, (copy, t) in enumerate(copies)],
            "train-real",
        )


if __name__ == "__main__":
    main()
