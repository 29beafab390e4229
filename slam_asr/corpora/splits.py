"""Which utterances train, which validate, which test: by subset, or held out by key."""

import functools
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from slam_asr.corpora import (
    BLANK,
    DUPLICATE,
    NO_AUDIO,
    NO_TRANSCRIPT,
    SPLIT_NAMES,
    SPLITS,
    Candidate,
    CorpusReader,
    Rejection,
)
from slam_asr.errors import UserError
from slam_asr.recipe import Data

_NAMED = 12
"""Subsets that a message names."""


def choose_subsets(reader: CorpusReader, data: Data) -> dict[str, list[str]]:
    """Subsets by split, after the recipe's patterns; `dev` may be without any.

    A subset called train, dev (or validation) or test belongs to that split.

    Raises:
        UserError: train or test is without a subset, or a subset is in two splits.
    """
    found = reader.subsets()
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    wanted = wanted_splits(data)
    for subset in found:
        splits = [s for s in SPLITS if any(fnmatchcase(subset, pattern) for pattern in getattr(data, s))]
        if subset in SPLIT_NAMES:
            splits = [SPLIT_NAMES[subset]]
        splits = [split for split in splits if split in wanted]
        if len(splits) > 1:
            raise UserError(
                f"The subset {subset} is in {' and in '.join(splits)} by the recipe's patterns "
                f"({', '.join(f'data.{s}: {getattr(data, s)}' for s in splits)}): make them exclude each other."
            )
        for split in splits:
            chosen[split].append(subset)
    for split in ("train", "test"):
        if split in wanted and not chosen[split]:
            named = ", ".join(found[:_NAMED]) + (f", … ({len(found)} in all)" if len(found) > _NAMED else "")
            raise UserError(
                f"No subset of {reader.root} is for {split}: the recipe's data.{split} asks for "
                f"{', '.join(getattr(data, split))}, and the corpus has {named}: change --data.{split}."
            )
    return chosen


def wanted_splits(data: Data) -> tuple[str, ...]:
    """The splits that the recipe wants utterances of: all, or where it trains on nothing, those for which it names subsets."""
    return tuple(split for split in SPLITS if data.train or getattr(data, split))


@dataclass
class Survey:
    """What there is before any audio is opened."""

    candidates: int = 0
    rejected: Counter = field(default_factory=Counter)
    """What is no candidate, by reason."""
    repeated: set[int] = field(default_factory=set)
    """Hashes of keys that come more than once (and, very seldom, of others)."""


def survey(reader: CorpusReader, chosen: dict[str, list[str]]) -> Survey:
    """Count the candidates and look at their keys.

    Raises:
        UserError: an utterance is in two splits, or all audio or all transcripts are missing.
    """
    found = Survey()
    hashes, splits = array("q"), array("b")
    first: Rejection | None = None
    for split, item in _items(reader, chosen):
        if isinstance(item, Rejection):
            found.rejected[item.reason] += 1
            first = first or item
        else:
            hashes.append(hash(item.key))
            splits.append(SPLITS.index(split))
    found.candidates = len(hashes)
    if not hashes and first is not None:
        _refuse_half_a_corpus(reader, found.rejected, first)
    order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
    ordered, of_split = np.frombuffer(hashes, np.int64)[order], np.frombuffer(splits, np.int8)[order]
    equal = ordered[1:] == ordered[:-1]
    found.repeated = set(ordered[1:][equal].tolist())
    across = set(ordered[1:][equal & (of_split[1:] != of_split[:-1])].tolist())
    if across:
        _refuse_two_splits(reader, chosen, across)
    return found


def read_splits(
    reader: CorpusReader, chosen: dict[str, list[str]], data: Data, repeated: set[int]
) -> Iterator[Candidate | Rejection]:
    """Candidates with their splits, transcripts written as the recipe wants them, and what is no candidate.

    Args:
        reader: the corpus.
        chosen: subsets by split.
        data: how transcripts are written.
        repeated: hashes of the keys that the survey met more than once; of such, the first is taken.
    """
    write = writer(data.text)
    seen: set[str] = set()
    for split, item in _items(reader, chosen):
        if isinstance(item, Candidate):
            item.split, item.text = split, write(item.text)
            if hash(item.key) in repeated:
                if item.key in seen:
                    detail = f"{item.extra.get('subset', split)} has {item.key} a second time."
                    item = Rejection(item.key, item.source, DUPLICATE, detail)
                else:
                    seen.add(item.key)
        if isinstance(item, Candidate) and not item.text:
            item = Rejection(item.key, item.source, BLANK, f"{item.key} has no words in its transcript.")
        yield item


def _items(reader: CorpusReader, chosen: dict[str, list[str]]) -> Iterator[tuple[str, Candidate | Rejection]]:
    for split, subsets in chosen.items():
        for subset in subsets:
            for item in reader.read(subset):
                yield split, item


def writer(text: str) -> Callable[[str], str]:
    """How a transcript is written after `data.text`; always with single spaces."""
    if text == "whisper":
        # Costs a second to import, for those who ask for it.
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        whisper = EnglishTextNormalizer({})
        return lambda transcript: " ".join(whisper(transcript).split())
    return functools.partial(normalise, case=text)


def normalise(text: str, case: str) -> str:
    """A transcript in the case that the recipe wants (`lower`, `upper` or `as-is`), with single spaces."""
    text = " ".join(text.split())
    return text.lower() if case == "lower" else text.upper() if case == "upper" else text


def _refuse_half_a_corpus(reader: CorpusReader, reasons: Counter, first: Rejection) -> None:
    if set(reasons) == {NO_AUDIO}:
        raise UserError(
            f"{reader.root} holds transcripts but no audio ({reasons[NO_AUDIO]} files are missing, first that of "
            f"{first.key}): was it unpacked whole, and do its paths hold on this machine?"
        )
    if set(reasons) == {NO_TRANSCRIPT}:
        raise UserError(
            f"{reader.root} holds audio but no transcripts ({reasons[NO_TRANSCRIPT]} files, first {first.source}): "
            "put the transcripts beside the audio, as the archive has them."
        )


def _refuse_two_splits(reader: CorpusReader, chosen: dict[str, list[str]], across: set[int]) -> None:
    split_of: dict[str, str] = {}
    for split, item in _items(reader, chosen):
        if isinstance(item, Rejection) or hash(item.key) not in across:
            continue
        first = split_of.setdefault(item.key, split)
        if first != split:
            raise UserError(
                f"The utterance {item.key} is in {first} and in {split} ({item.source}): "
                "an utterance may be in one split only, so take it out of one of them."
            )


def held_out(keys: Iterable[str], fraction: float) -> set[str]:
    """The share of `keys` to hold out, at least one: each is chosen by its own hash, whatever the others are."""
    chosen: set[str] = set()
    lowest: tuple[float, str] | None = None
    for key in keys:
        rank = _rank(key)
        if rank < fraction:
            chosen.add(key)
        if lowest is None or rank < lowest[0]:
            lowest = rank, key
    return chosen or ({lowest[1]} if lowest else set())


def _rank(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
