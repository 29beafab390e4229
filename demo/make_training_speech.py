"""Makes many hours of speech to train a projector on: a corpus' own text by many synthetic voices, and real speech varied.

    python make_training_speech.py --text transcripts.txt --real LibriSpeech/train-clean-100 --out training-speech

`transcripts.txt` has lines `<key> TEXT IN CAPITALS`, as LibriSpeech's transcripts do. Pieces of its lines, 3 to 32 words
long, are spoken by espeak-ng and flite in voices of drawn accent, variant, pitch and pace, and joined to utterances of up to 20 s. Utterances of `--real`, a folder
in LibriSpeech's layout, are written as they are and `--copies` times at another speed, which changes pace and pitch.
Room echo and noise are laid over most of both, but never over the real ones as they are. Every twentieth chapter of the
real speech is held out for validation.

    <out>/train-synthetic/<speaker>/1/<speaker>-1-<NNNN>.flac       and a .trans.txt beside the audio
    <out>/train-real/<speaker>/<chapter>/<speaker>-<chapter>-<NNNN>.flac    copies: chapter + 1 000 000 · number
    <out>/dev-real/                                                 the same, without copies

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
"""Three of them were made from recordings of people."""
VOICES, EACH = 600, 15
"""Synthetic speakers of one seed, and the pieces of text that each speaks."""
PAUSE = (0.1, 0.5)
"""Seconds between joined pieces."""
JOINED = (1.5, 20.0)
"""Seconds that pieces are joined to: Whisper's encoder takes as long for one second as for thirty."""
FLITE_SHARE = 0.4
WORDS = (3, 32)
SPEEDS = (0.88, 1.12)
HELD_OUT = 20


def draw_speaker(number: int, rng: random.Random) -> Speaker:
    """A synthetic voice."""
    if rng.random() < FLITE_SHARE:
        return Speaker(number, "flite", rng.choice(FLITE), rng.uniform(0.8, 1.15))
    return Speaker(
        number,
        "espeak-ng",
        rng.choice(ACCENTS) + rng.choice(VARIANTS),
        rng.uniform(130, 210),
        rng.randint(20, 80),
    )


def draw_piece(words: list[str], rng: random.Random) -> list[str]:
    """Neighbouring words; short pieces are as frequent as long ones in the logarithm of their length."""
    low, high = WORDS
    length = min(len(words), round(low * (high / low) ** rng.random()))
    start = rng.randrange(len(words) - length + 1)
    return words[start : start + length]


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Samples played faster or slower, pitch included."""
    return soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE)


def disturb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Room echo over a third, coloured noise at 8 to 40 dB over most; peak at a drawn level."""
    if rng.random() < 0.33:
        decay = rng.uniform(0.05, 0.4)  # seconds to -60 dB
        times = np.arange(round(decay * SAMPLE_RATE)) / SAMPLE_RATE
        echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / decay) * rng.uniform(0.02, 0.15)
        echo[0] = 1.0
        size = len(samples) + len(echo)
        samples = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(echo, size), size)[: len(samples)]
    if rng.random() < 0.75:
        spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
        spectrum /= np.maximum(np.arange(len(spectrum)), len(spectrum) / 400) ** rng.uniform(0.0, 1.0)
        noise = np.fft.irfft(spectrum, len(samples))
        level = np.sqrt(np.mean(samples**2) / max(np.mean(noise**2), 1e-12))
        samples = samples + noise * level * 10 ** (-rng.uniform(8, 40) / 20)
    return (samples * (rng.uniform(0.1, 0.9) / max(np.abs(samples).max(), 1e-6))).astype(np.float32)


def write(folder: Path, speaker: str, chapter: int, utterances: Iterable[tuple[str, np.ndarray]]) -> float:
    """One chapter in LibriSpeech's layout → seconds of speech."""
    place = folder / speaker / str(chapter)
    place.mkdir(parents=True)
    lines, seconds = [], 0.0
    for number, (text, samples) in enumerate(utterances):
        key = f"{speaker}-{chapter}-{number:04d}"
        soundfile.write(place / f"{key}.flac", samples, SAMPLE_RATE)
        lines.append(f"{key} {text}\n")
        seconds += len(samples) / SAMPLE_RATE
    (place / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return seconds


def synthesise(task: tuple[Path, int, list[list[str]], tuple[float, float], int]) -> float:
    """All pieces of one synthetic speaker, some of them joined → seconds of speech."""
    folder, number, pieces, joined, seed = task
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    speaker = draw_speaker(number, rng)
    own_speed = rng.uniform(*SPEEDS)  # gives flite's four voices more than four throats
    with tempfile.TemporaryDirectory() as scratch:
        spoken = [
            disturb(at_speed(speak(speaker, " ".join(words).lower(), Path(scratch)), own_speed), noise)
            for words in pieces
        ]
    return write(folder, str(number), 1, join(spoken, [" ".join(words) for words in pieces], joined, rng))


def join(
    spoken: list[np.ndarray], texts: list[str], joined: tuple[float, float], rng: random.Random
) -> Iterator[tuple[str, np.ndarray]]:
    """Pieces one behind the other, with pauses, up to a drawn length each time."""
    low, high = joined
    at = 0
    while at < len(spoken):
        length = low * (high / low) ** rng.random() * SAMPLE_RATE
        samples, words = spoken[at], [texts[at]]
        at += 1
        while at < len(spoken) and len(samples) + len(spoken[at]) < length:
            samples = np.concatenate(
                [samples, np.zeros(round(rng.uniform(*PAUSE) * SAMPLE_RATE), np.float32), spoken[at]]
            )
            words.append(texts[at])
            at += 1
        yield " ".join(words), samples


def vary(task: tuple[Path, Path, int, int]) -> float:
    """One chapter of real speech, as it is (copy 0) or varied → seconds of speech."""
    folder, transcript, copy, seed = task
    noise = np.random.default_rng(seed)
    speaker, chapter = transcript.name.removesuffix(".trans.txt").split("-")
    utterances = []
    for line in transcript.read_text().splitlines():
        key, _, text = line.partition(" ")
        samples, _ = soundfile.read(transcript.parent / f"{key}.flac", dtype="float32")
        utterances.append(
            (text, disturb(at_speed(samples, noise.uniform(*SPEEDS)), noise) if copy else samples)
        )
    return write(folder, speaker, int(chapter) + 1_000_000 * copy, utterances)


def in_parallel(work: Callable, tasks: list, name: str) -> None:
    """Do all of them on all cores, and say what came of it."""
    with multiprocessing.Pool() as pool:
        seconds = sum(pool.imap_unordered(work, tasks))
    print(f"{name:16} {len(tasks):6} chapters {seconds / 3600:7.2f} h", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="lines `<key> TEXT`")
    parser.add_argument("--real", type=Path, help="folder of real speech in LibriSpeech's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist yet")
    parser.add_argument(
        "--voices", type=int, default=VOICES, help=f"synthetic speakers, of {VOICES} (default: %(default)s)"
    )
    parser.add_argument(
        "--each",
        type=int,
        default=EACH,
        help="pieces of text that each of them speaks (default: %(default)s)",
    )
    parser.add_argument(
        "--joined",
        type=float,
        nargs=2,
        default=JOINED,
        metavar=("SHORTEST", "LONGEST"),
        help="seconds that pieces are joined to (default: %(default)s)",
    )
    parser.add_argument(
        "--first-voice",
        type=int,
        default=1,
        help="number of the first of them, so that several runs can lie in one corpus (default: %(default)s)",
    )
    parser.add_argument(
        "--copies", type=int, default=2, help="of each real utterance, beside itself (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"there is no file {args.text}: name one with lines `<key> TEXT`")
    if args.out.exists():
        parser.error(f"{args.out} exists already: choose another folder")
    if args.real and not any(args.real.rglob("*.trans.txt")):
        parser.error(f"{args.real} holds no .trans.txt: name a folder in LibriSpeech's layout")
    absent = [program for program in ("espeak-ng", "flite") if args.voices and not shutil.which(program)]
    if absent:
        parser.error(f"{absent[0]} is not on the PATH: `apt-get install espeak-ng flite`")

    rng = random.Random(args.seed)
    lines = [
        words for line in args.text.read_text().splitlines() if len(words := line.split()[1:]) >= WORDS[0]
    ]
    if not lines:
        parser.error(f"{args.text} has no line `<key> TEXT` with {WORDS[0]} words or more")
    pieces = [draw_piece(rng.choice(lines), rng) for _ in range(VOICES * args.each)]
    args.out.mkdir(parents=True)
    tasks = [
        (
            args.out / "train-synthetic",
            100_000 + args.first_voice + n,
            pieces[n::VOICES],
            tuple(args.joined),
            args.seed + n,
        )
        for n in range(args.voices)
    ]
    in_parallel(synthesise, tasks, "train-synthetic")
    if args.real:
        chapters = sorted(args.real.rglob("*.trans.txt"))
        held_out = chapters[HELD_OUT // 2 :: HELD_OUT]
        in_parallel(vary, [(args.out / "dev-real", t, 0, 0) for t in held_out], "dev-real")
        copies = [(copy, t) for copy in range(args.copies + 1) for t in chapters if t not in held_out]
        in_parallel(
            vary,
            [(args.out / "train-real", t, copy, args.seed + n) for n, (copy, t) in enumerate(copies)],
            "train-real",
        )


if __name__ == "__main__":
    main()
