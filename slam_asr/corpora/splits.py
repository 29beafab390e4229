"""Which utterances train, which validate, which test: by subset, or held out by key."""

import hashlib
from fnmatch import fnmatchcase

from slam_asr.corpora import BLANK, DUPLICATE, NO_AUDIO, NO_TRANSCRIPT, SPLITS, Candidate, Reader, Rejection
from slam_asr.errors import UserError
from slam_asr.recipe import Data


def choose_subsets(reader: Reader, data: Data) -> dict[str, list[str]]:
    """Subsets by split, after the recipe's patterns; `dev` may be without any.

    A subset called train, dev or test belongs to that split.

    Raises:
        UserError: train or test is without a subset, or a subset is in two splits.
    """
    found = reader.subsets()
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    for subset in found:
        splits = [s for s in SPLITS if any(fnmatchcase(subset, pattern) for pattern in getattr(data, s))]
        if subset in SPLITS:
            splits = [subset]
        if len(splits) > 1:
            raise UserError(
                f"The subset {subset} is in {' and in '.join(splits)} by the recipe's patterns "
                f"({', '.join(f'data.{s}: {getattr(data, s)}' for s in splits)}): make them exclude each other."
            )
        for split in splits:
            chosen[split].append(subset)
    for split in ("train", "test"):
        if not chosen[split]:
            raise UserError(
                f"No subset of {reader.root} is for {split}: the recipe's data.{split} asks for "
                f"{', '.join(getattr(data, split))}, and the corpus has {', '.join(found)}: change --data.{split}."
            )
    return chosen


def read_splits(
    reader: Reader, chosen: dict[str, list[str]], data: Data
) -> tuple[list[tuple[str, Candidate]], list[Rejection]]:
    """Candidates with their splits, transcripts written as the recipe wants them, and what is no candidate.

    Raises:
        UserError: an utterance is in two splits, or all audio or all transcripts are missing.
    """
    candidates: list[tuple[str, Candidate]] = []
    rejected: list[Rejection] = []
    split_of: dict[str, str] = {}
    for split, subset in ((split, subset) for split, names in chosen.items() for subset in names):
        for item in reader.read(subset):
            if isinstance(item, Rejection):
                rejected.append(item)
                continue
            known = item.key in split_of
            first = split_of.setdefault(item.key, split)
            if first != split:
                raise UserError(
                    f"The utterance {item.key} is in {first} and in {split} ({item.source}): "
                    "an utterance may be in one split only, so take it out of one of them."
                )
            item.text = normalise(item.text, data.text)
            if known:
                rejected.append(Rejection(item.key, item.source, DUPLICATE, f"{subset} has {item.key} a second time."))
            elif not item.text:
                rejected.append(Rejection(item.key, item.source, BLANK, f"{item.key} has no words in its transcript."))
            else:
                candidates.append((split, item))
    if not candidates:
        _refuse_half_a_corpus(reader, rejected)
    return candidates, rejected


def normalise(text: str, case: str) -> str:
    """A transcript in the case that the recipe wants (`lower`, `upper` or `as-is`), with single spaces."""
    text = " ".join(text.split())
    return {"lower": text.lower(), "upper": text.upper()}.get(case, text)


def _refuse_half_a_corpus(reader: Reader, rejected: list[Rejection]) -> None:
    reasons = {r.reason for r in rejected}
    if reasons == {NO_AUDIO}:
        raise UserError(
            f"{reader.root} holds transcripts but no audio ({len(rejected)} files are missing, first that of "
            f"{rejected[0].key}): was it unpacked whole, and do its paths hold on this machine?"
        )
    if reasons == {NO_TRANSCRIPT}:
        raise UserError(
            f"{reader.root} holds audio but no transcripts ({len(rejected)} files, first {rejected[0].source}): "
            "put the transcripts beside the audio, as the archive has them."
        )


def held_out(keys: list[str], fraction: float) -> set[str]:
    """The share of `keys` to hold out, at least one: each is chosen by its own hash, whatever the others are."""
    ranked = sorted(keys, key=_rank)
    return set(ranked[: max(1, sum(_rank(key) < fraction for key in ranked))])


def _rank(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
