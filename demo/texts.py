"""Texts for the synthesiser to speak: random sentences of a small grammar, and pieces of transcripts."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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

LENGTHS = (8, 25)
"""Minimum and maximum number of words of an utterance in each of the subsets. Short utterances are avoided,
because Whisper needs as much time to encode one second as to encode thirty."""
HELD_OUT = {10: "dev-synthetic", 30: "test-synthetic"}
"""Positions of the held-out chapters among every 40 chapters of the text, each with its subset."""


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield different random sentences of the grammar, in lower case, without end."""
    seen = set()
    while True:
        slots = {slot: rng.choice(words) for slot, words in WORDS.items()}
        sentence = rng.choice(PATTERNS).format(**slots)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def pieces(lines: list[str]) -> Iterator[str]:
    """Cut or join a chapter's lines into texts with a number of words within LENGTHS.

    Long lines are cut into pieces of equal length. Short lines are joined with the next short ones, with a
    comma between them; long lines may be in between. Joined lines that are still too short are left out.
    """
    shortest, longest = LENGTHS
    joined: list[str] = []
    for line in lines:
        words = line.split()
        if len(words) > longest:
            count = -(-len(words) // longest)
            for part in np.array_split(words, count):
                yield " ".join(part)
            continue
        if sum(len(text.split()) for text in joined) + len(words) > longest:
            joined = []
        joined.append(" ".join(words))
        if sum(len(text.split()) for text in joined) >= shortest:
            yield ", ".join(joined)
            joined = []


def read_chapters(path: Path) -> list[list[str]]:
    """Read the lines `<chapter>-<number> TEXT` of a file: the texts of each chapter, in order of their names.

    Texts are in lower case. Lines that have anything but words in English letters are left out.
    """
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, text = line.partition(" ")
        if re.fullmatch(r"[a-z' ]+", text.lower()) and key.count("-"):
            chapters.setdefault(key.rpartition("-")[0], []).append(text.lower())
    return [chapters[name] for name in sorted(chapters)]


def select_texts(path: Path, seed: int) -> dict[str, list[str]]:
    """Read the lines `<chapter>-<number> TEXT` of a file, and share the chapters between the subsets.

    Returns:
        For each subset, its texts in random order. No chapter is in two subsets.

    Raises:
        ValueError: no line has this form, or the lines are too short for a single training utterance.
    """
    texts: dict[str, list[str]] = {subset: [] for subset in ("train-synthetic", *HELD_OUT.values())}
    for position, lines in enumerate(read_chapters(path)):
        texts[HELD_OUT.get(position % 40, "train-synthetic")].extend(pieces(lines))
    if not texts["train-synthetic"]:
        raise ValueError(
            f"{path} gives no training text: it needs lines `<chapter>-<number> TEXT` of English words, and "
            f"at least {LENGTHS[0]} words in a chapter"
        )
    for subset in texts.values():
        random.Random(seed).shuffle(subset)
    return texts
