"""Assigns utterances to train, dev and test by subset. Dev may be held out of train, by the keys' hashes."""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from slam_asr.artifacts.writing_systems import comparable, is_english, is_latin, normalise_english
from slam_asr.config.recipe import Data
from slam_asr.corpora import SPLIT_NAMES, SPLITS, Candidate, CorpusReader, Item, Reason, Rejection, Subsets
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.progress import log_line

_MAX_LISTED = 12
"""Maximum number of subsets that a message lists."""
_MAX_SECONDS = 1e9
"""Limit on times in seconds (30 years), so that numbers of samples can be computed from them."""
_TAG = re.compile(r"<[^<>\s]{1,40}>")
"""Matches a tag in a transcript, such as `<noise>`."""
_PUNCTUATION = {"comma": ",", "period": ".", "questionmark": "?", "exclamationpoint": "!"}
"""GigaSpeech's tags for punctuation (Chen et al., 2021), without their brackets."""
_PUNCTUATION_TAG = re.compile(rf"\s*<({'|'.join(_PUNCTUATION)})>", re.IGNORECASE)


def choose_subsets(reader: CorpusReader, data: Data) -> Subsets:
    """Match subsets against the recipe's patterns, and return their names by split.

    A subset named train, dev (or validation, valid or val) or test, in lower or upper case, belongs to that
    split, regardless of the patterns. If no subset is for dev, a part of train is held out for it later.

    Raises:
        ConfigurationError: train or test is required but has no subset, or a subset is in two splits.
    """
    available = reader.subsets()
    subsets: Subsets = {split: [] for split in SPLITS}
    required = required_splits(data)
    for subset in available:
        splits = requested_splits(subset, data)
        if len(splits) > 1:
            patterns = ", ".join(f"data.{s}: {getattr(data, s)}" for s in splits)
            raise ConfigurationError(
                f"The subset {subset} is in {' and in '.join(splits)} by the recipe's patterns "
                f"({patterns}): make them exclude each other."
            )
        for split in splits:
            subsets[split].append(subset)
    for split in ("train", "test"):
        if split in required and not subsets[split]:
            names = ", ".join(available[:_MAX_LISTED])
            names += f", … ({len(available)} in all)" if len(available) > _MAX_LISTED else ""
            raise ConfigurationError(
                f"No subset of {reader.root} is for {split}: the recipe's data.{split} is "
                f"{', '.join(getattr(data, split))}, but the corpus has {names}: change --data.{split}."
            )
    return subsets


def requested_splits(subset: str, data: Data) -> list[str]:
    """Return the splits to which a subset belongs by its name, or else by the recipe's patterns.

    A subset of one of a dataset's configurations, such as `clean/test`, is matched by the part after the
    slash, and then by its full name. If a pattern of the recipe has a slash and thus chooses among
    configurations, only the full name is matched.
    """
    patterns = {split: getattr(data, split) for split in required_splits(data)}
    by_configuration = any("/" in pattern for split in patterns for pattern in patterns[split])
    for name in (subset,) if by_configuration else (subset.rpartition("/")[2], subset):
        if split := SPLIT_NAMES.get(name.lower()):
            return [split] if split in patterns else []
        splits = [s for s in patterns if any(fnmatchcase(name, pattern) for pattern in patterns[s])]
        if splits:
            return splits
    return []


def required_splits(data: Data) -> tuple[str, ...]:
    """Return the splits that need utterances: all, or only those with patterns if train has no pattern."""
    return tuple(split for split in SPLITS if data.train or getattr(data, split))


@dataclass
class Survey:
    """Counts of a corpus before any audio is opened."""

    candidates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of rejections by reason."""
    repeated: set[int] = field(default_factory=set)
    """Hashes of the identities that occur more than once. Rarely, another identity has the same hash."""
    tagged: int = 0
    """Number of transcripts with a tag such as `<noise>`."""
    tags: Counter[str] = field(default_factory=Counter)
    """Number of occurrences of each tag."""


def survey(reader: CorpusReader, subsets: Subsets) -> Survey:
    """Count the candidates and find repeated utterances, with a few bytes of memory per candidate.

    Raises:
        InputError: an utterance is in two splits, different utterances have the same key, or all audio or all
            transcripts are missing.
    """
    while True:
        # The corpus is counted again after each refinement, which changes all keys.
        counts, keys, identities, splits = _count(reader, subsets)
        # After sorting, equal hashes are adjacent. If a key has several identities, at least one adjacent
        # pair has different ones.
        order = np.lexsort((identities, keys))
        keys, sorted_identities = keys[order], identities[order]
        ambiguous = (keys[1:] == keys[:-1]) & (sorted_identities[1:] != sorted_identities[:-1])
        if not ambiguous.any():
            break
        if not (note := reader.refine_keys()):
            # This returns if the keys themselves differ and only their hashes are equal.
            _refuse_ambiguous(reader, subsets, set(keys[1:][ambiguous].tolist()))
            break
        log_line(f"build-manifest: {note}")
    # An identity in several splits is found in the same way. Its entries are adjacent after sorting, and at
    # least one adjacent pair has different splits.
    order = np.argsort(identities, kind="stable")
    identities, splits = identities[order], splits[order]
    equal = identities[1:] == identities[:-1]
    counts.repeated = set(identities[1:][equal].tolist())
    across = set(identities[1:][equal & (splits[1:] != splits[:-1])].tolist())
    if across:
        _refuse_two_splits(reader, subsets, across)
    return counts


def _count(reader: CorpusReader, subsets: Subsets) -> tuple[Survey, np.ndarray, np.ndarray, np.ndarray]:
    """Return the counts, and for each candidate the hashes of key and identity, and the split's number.

    Returns:
        The counts; int64 [candidates], int64 [candidates], and int8 [candidates].
    """
    counts = Survey()
    keys, identities, splits = array("q"), array("q"), array("b")
    first: Rejection | None = None
    for split, item in _items(reader, subsets):
        if isinstance(item, Rejection):
            counts.rejected[item.reason] += 1
            first = first or item
            continue
        _refuse_unwritable(item)
        # Among ten million keys, two have the same hash with a probability of about 3 in a million. No corpus
        # is refused for that, because `_refuse_ambiguous` and `_refuse_two_splits` compare the texts.
        keys.append(hash(item.key))
        identities.append(hash(item.identity or item.key))
        splits.append(SPLITS.index(split))
        if tags := _TAG.findall(item.text):
            counts.tagged += 1
            counts.tags.update(tags)
    counts.candidates = len(keys)
    if not keys and first is not None:
        _refuse_missing_half(reader, counts.rejected, first)
    return counts, np.asarray(keys), np.asarray(identities), np.asarray(splits)


def read_splits(reader: CorpusReader, subsets: Subsets, data: Data, repeated: set[int]) -> Iterator[Item]:
    """Yield rejections, and candidates with their splits and normalised transcripts.

    Args:
        reader: the corpus.
        subsets: names of subsets by split.
        data: the recipe's `data` section, which defines the form of transcripts.
        repeated: hashes of the identities that occur more than once. The first such utterance is used, and
            the others are rejected.

    Raises:
        ConfigurationError: `data.text` is for English, and a transcript is not.
    """
    is_for_english = data.text == "whisper"
    seen: set[str] = set()
    for split, item in _items(reader, subsets):
        if isinstance(item, Candidate):
            if is_for_english:
                _require_english(item)
            item.split, item.text = split, normalise(without_tags(item.text, data.tags), data.text)
            identity = item.identity or item.key
            # Only identities that may repeat are remembered, because memory may not hold those of all.
            if hash(identity) in repeated:
                if identity in seen:
                    detail = f"{item.extra.get('subset', split)} has {item.key} a second time."
                    item = Rejection(item.key, item.source, Reason.DUPLICATE, detail)
                else:
                    seen.add(identity)
        if isinstance(item, Candidate) and not item.text:
            detail = f"{item.key} has no words in its transcript."
            item = Rejection(item.key, item.source, Reason.BLANK, detail)
        yield item


def _items(reader: CorpusReader, subsets: Subsets) -> Iterator[tuple[str, Item]]:
    for split, names in subsets.items():
        for name in names:
            for item in reader.read(name):
                yield split, item


def without_tags(text: str, tags: str) -> str:
    """Keep, remove or convert tags such as `<noise>` in a transcript, as `data.tags` says."""
    if tags == "keep":
        return text
    if tags == "punctuation":
        text = _PUNCTUATION_TAG.sub(lambda match: _PUNCTUATION[match[1].lower()], text)
    return _TAG.sub(" ", text)


def normalise(text: str, form: str) -> str:
    """Convert a transcript to the form of `data.text`, in Unicode's NFC with single spaces."""
    if form == "whisper":
        return normalise_english(text)
    return comparable(text.lower() if form == "lower" else text.upper() if form == "upper" else text)


def _require_english(item: Candidate) -> None:
    """Refuse a transcript that Whisper's normaliser for English would damage.

    Raises:
        ConfigurationError: the corpus names another language, or the transcript has letters other than Latin.
    """
    language = str(item.extra.get("language") or item.extra.get("locale") or "")
    if (language and not is_english(language)) or not is_latin(item.text):
        raise ConfigurationError(
            f"The transcript of {item.key} is not in English{f' ({language})' * bool(language)}, but "
            "data.text: whisper is Whisper's normaliser for English: choose lower, upper or as-is with "
            "--data.text."
        )


def _refuse_missing_half(reader: CorpusReader, reasons: Counter[str], first: Rejection) -> None:
    """Raise if the reasons for rejections show that a corpus has no audio, or no transcripts."""
    if set(reasons) == {Reason.NO_AUDIO}:
        raise InputError(
            f"{reader.root} holds transcripts but no audio (missing files: {reasons[Reason.NO_AUDIO]}, first "
            f"that of {first.key}): check that it was unpacked completely and that its paths are valid."
        )
    if set(reasons) == {Reason.NO_TRANSCRIPT}:
        raise InputError(
            f"{reader.root} holds audio but no transcripts (files: {reasons[Reason.NO_TRANSCRIPT]}, first "
            f"{first.source}): put the transcripts next to the audio, as in the archive."
        )


def _refuse_unwritable(item: Candidate) -> None:
    """Raise if an utterance cannot be written to a manifest.

    A corpus in JSON may contain times such as NaN. It may also contain lone surrogates, which UTF-8 cannot
    encode.
    """
    for seconds in (item.start or 0.0, item.duration or 0.0):
        if not 0 <= seconds < _MAX_SECONDS:
            raise InputError(
                f"The utterance {item.key} ({item.source}) has a time of {seconds:g} s: correct it."
            )
    for value in (item.key, item.text):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"The utterance {item.key.encode('utf-8', 'backslashreplace').decode()} has half a character "
                "(a lone surrogate) in its key or transcript: correct it."
            ) from None


def _refuse_ambiguous(reader: CorpusReader, subsets: Subsets, repeated: set[int]) -> None:
    """Raise for the first key that two different utterances have. `repeated` has the hashes of such keys."""
    first: dict[str, str] = {}
    for _, item in _items(reader, subsets):
        if isinstance(item, Rejection) or hash(item.key) not in repeated:
            continue
        identity = item.identity or item.key
        if first.setdefault(item.key, identity) != identity:
            raise InputError(
                f"{reader.root} has two utterances called {item.key} with different audio, the second from "
                f"{item.source}: name a column of unique keys with --data.columns.key."
            )


def _refuse_two_splits(reader: CorpusReader, subsets: Subsets, across: set[int]) -> None:
    """Raise for the first utterance that is in two splits.

    `across` has the hashes of the identities in question. In rare cases, two different identities have the
    same hash; then this returns.
    """
    split_of: dict[str, str] = {}
    for split, item in _items(reader, subsets):
        if isinstance(item, Rejection) or hash(item.identity or item.key) not in across:
            continue
        first = split_of.setdefault(item.identity or item.key, split)
        if first != split:
            raise InputError(
                f"The utterance {item.key} is in {first} and in {split} ({item.source}): "
                "an utterance may be in one split only; remove it from the other."
            )


def held_out(keys: Iterable[str], fraction: float) -> set[str]:
    """Select about `fraction` of the keys, at least one.

    Each key is selected by its own hash, so an utterance stays in its split when others are added or
    removed.
    """
    selected: set[str] = set()
    lowest = 1.0, ""
    for key in keys:
        # A pseudo-random number in [0, 1). It has 48 bits, which a float of 53 bits represents exactly.
        rank = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
        lowest = min(lowest, (rank, key))
        if rank < fraction:
            selected.add(key)
    return selected or {lowest[1]} - {""}
