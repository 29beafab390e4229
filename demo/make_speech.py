"""Generate the demo's speech corpus: sentences of a small grammar, spoken by free synthesisers.

Sentences come from a grammar of about seventy words. Sixteen synthetic speakers (espeak-ng and flite voices)
read them. The layout is LibriSpeech's:

    <out>/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<NNNN>.opus
    <out>/<subset>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt     lines `<utterance> TEXT IN CAPITALS`

An utterance is two sentences. No sentence occurs twice, within a subset or across subsets. The speakers of
`test-demo-new-voices` occur nowhere else.

Needs `espeak-ng` and `flite` on the PATH, and the Python packages numpy, soundfile and soxr:

    python make_speech.py --out speech

The same seed and the same versions of the synthesisers give the same transcripts and the same decoded
samples, but not the same bytes, because every Ogg stream has a random serial number.
"""

import argparse
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
# Each subset is a chapter of its own, so that no key occurs in two subsets.
CHAPTERS = {"train-demo": 1, "dev-demo": 2, "test-demo-known-voices": 3, "test-demo-new-voices": 4}
PEAK = 0.5
SILENCE = 0.01  # fraction of the peak: quieter samples at both ends are trimmed
MARGIN_S = 0.06  # seconds that are retained on both sides of the trimmed speech
SENTENCES = 2  # in an utterance; Whisper's encoder takes as long for one as for many
OPUS_COMPRESSION = 0.95  # libsndfile's scale from 0 to 1; about 20 kbit/s at 16 kHz mono

# Each line is a pattern of sentences. {slots} are filled with random words from WORDS.
PATTERNS = (
    "{whose} {person} {took} {number} {colour} {things}",
    "{whose} {person} {moved} {where} the {place}",
    "the {mood} {person} {moved} {when}",
    "please {give} {number} {colour} {things}",
    "the {colour} {things} are {where} the {place}",
    "{when} {whose} {person} {took} the {things}",
)
WORDS = {
    "whose": ("my", "the", "our"),
    "person": ("mother", "sister", "brother", "doctor", "farmer", "teacher", "captain", "children"),
    "mood": ("happy", "young", "tired", "quiet"),
    "took": ("found", "painted", "carried", "wanted", "bought", "counted"),
    "moved": ("walked", "waited", "danced", "worked", "laughed"),
    "give": ("bring", "wash", "hide", "sell"),
    "number": ("three", "four", "five", "seven", "nine", "twelve"),
    "colour": ("red", "green", "yellow", "white", "black", "purple"),
    "things": ("apples", "boxes", "flowers", "horses", "letters", "tables", "chairs", "candles"),
    "where": ("near", "behind", "under", "beside"),
    "place": ("river", "bridge", "garden", "station", "mountain", "window", "market"),
    "when": ("today", "yesterday", "last winter", "every morning", "at night"),
}


@dataclass(frozen=True)
class Speaker:
    """A synthetic voice.

    `voice` is espeak-ng's `accent+variant`, or flite's voice name. `pitch` (espeak-ng only) is from 0 to 99.
    `pace` is in words per minute for espeak-ng; for flite, it is the factor by which every sound is
    stretched.
    """

    id: int
    engine: str
    voice: str
    pace: float
    pitch: int | None = None

    def command(self, text: str, wav: Path) -> list[str]:
        """Return the command line that speaks `text` into the file `wav`."""
        if self.engine == "flite":
            return [
                "flite",
                "-voice",
                self.voice,
                "--setf",
                f"duration_stretch={self.pace}",
                "-t",
                text,
                "-o",
                str(wav),
            ]
        return [
            "espeak-ng",
            "-v",
            self.voice,
            "-s",
            f"{self.pace:.0f}",
            "-p",
            str(self.pitch),
            "-w",
            str(wav),
            text,
        ]


KNOWN_VOICES = (
    Speaker(1, "flite", "kal16", 0.9),
    Speaker(2, "flite", "awb", 0.9),
    Speaker(3, "flite", "slt", 0.9),
    Speaker(4, "espeak-ng", "en-us", 170, 45),
    Speaker(5, "espeak-ng", "en-us+f3", 180, 55),
    Speaker(6, "espeak-ng", "en-us+m3", 165, 35),
    Speaker(7, "espeak-ng", "en-gb", 175, 50),
    Speaker(8, "espeak-ng", "en-gb+f2", 170, 60),
    Speaker(9, "espeak-ng", "en-gb-x-rp+m7", 180, 40),
    Speaker(10, "espeak-ng", "en-gb-scotland+f4", 170, 50),
    Speaker(11, "espeak-ng", "en-gb-x-gbclan+m1", 175, 55),
    Speaker(12, "espeak-ng", "en-us-nyc+f5", 170, 45),
)
NEW_VOICES = (
    Speaker(13, "flite", "rms", 0.9),
    Speaker(14, "espeak-ng", "en-us+f1", 175, 65),
    Speaker(15, "espeak-ng", "en-gb+m2", 170, 30),
    Speaker(16, "espeak-ng", "en-gb-x-rp+f3", 175, 45),
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield different random sentences of the grammar, in lower case, without end."""
    seen = set()
    while True:
        slots = {slot: rng.choice(words) for slot, words in WORDS.items()}
        sentence = rng.choice(PATTERNS).format(**slots)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def speak(speaker: Speaker, text: str, folder: Path) -> np.ndarray:
    """Synthesise a text: float32 [samples] at SAMPLE_RATE Hz, with silence trimmed and the peak at PEAK.

    Args:
        speaker: the voice.
        text: the text to speak.
        folder: a folder for temporary files.
    """
    wav = folder / "speech.wav"
    subprocess.run(speaker.command(text, wav), check=True)
    samples, rate = soundfile.read(wav, dtype="float32")
    samples = soxr.resample(samples, rate, SAMPLE_RATE)
    samples *= PEAK / np.abs(samples).max()
    loud = np.flatnonzero(np.abs(samples) > SILENCE * PEAK)
    margin = round(MARGIN_S * SAMPLE_RATE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def write_subset(folder: Path, speakers: tuple[Speaker, ...], texts: list[str], scratch: Path) -> float:
    """Write a subset in LibriSpeech's layout, and return its seconds of speech.

    Args:
        folder: the subset's folder; its name is a key of CHAPTERS.
        speakers: the voices, which take turns.
        texts: one text per utterance, in lower case.
        scratch: a folder for temporary files.
    """
    seconds = 0.0
    number = CHAPTERS[folder.name]
    for position, speaker in enumerate(speakers):
        chapter = folder / str(speaker.id) / str(number)
        chapter.mkdir(parents=True)
        lines = []
        for index, text in enumerate(texts[position :: len(speakers)]):
            utterance = f"{speaker.id}-{number}-{index:04d}"
            samples = speak(speaker, text, scratch)
            soundfile.write(
                chapter / f"{utterance}.opus",
                samples,
                SAMPLE_RATE,
                format="OGG",
                subtype="OPUS",
                compression_level=OPUS_COMPRESSION,
            )
            lines.append(f"{utterance} {text.upper()}\n")
            seconds += len(samples) / SAMPLE_RATE
        (chapter / f"{speaker.id}-{number}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return seconds


def words_of(texts: list[str]) -> set[str]:
    """Return the vocabulary of the texts."""
    return {word for text in texts for word in text.split()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist yet")
    for name, default, meaning in (
        ("--seed", 1, "seed of the random sentences"),
        ("--train", 96, "training utterances"),
        ("--dev", 12, "dev utterances"),
        ("--test", 24, "utterances in each test set"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    args = parser.parse_args()

    random_sentences = sentences(random.Random(args.seed))
    # Subsets take their sentences in this order, so the order is part of what a seed determines.
    plan = {
        "dev-demo": (KNOWN_VOICES, args.dev),
        "test-demo-known-voices": (KNOWN_VOICES, args.test),
        "test-demo-new-voices": (NEW_VOICES, args.test),
        "train-demo": (KNOWN_VOICES, args.train),
    }
    texts = {
        subset: [" ".join(next(random_sentences) for _ in range(SENTENCES)) for _ in range(count)]
        for subset, (_, count) in plan.items()
    }
    all_texts = [text for subset in texts.values() for text in subset]
    assert words_of(all_texts) == words_of(texts["train-demo"]), "a word is missing from the training subset"
    assert not {s.id for s in KNOWN_VOICES} & {s.id for s in NEW_VOICES}, "a new voice is also a known one"

    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        for subset, (speakers, _) in plan.items():
            seconds = write_subset(args.out / subset, speakers, texts[subset], Path(scratch))
            print(f"{subset:24} {len(texts[subset]):5} utterances {seconds / 60:6.1f} min")
    rows = [f"{s.id}\t{s.engine}\t{s.voice}\t{s.pace}\t{s.pitch or '-'}\n" for s in KNOWN_VOICES + NEW_VOICES]
    (args.out / "speakers.tsv").write_text(
        "".join(["speaker\tengine\tvoice\tpace\tpitch\n", *rows]), encoding="utf-8"
    )
    print(f"{len(words_of(all_texts))} words")


if __name__ == "__main__":
    main()
