"""Builds the manifests of a corpus: checks every utterance, and writes the usable ones, sorted by key.

Utterances are streamed and sorted through local disk, so memory grows by only a few bytes per utterance.
"""

import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slam_asr.artifacts.json_lines import json_line
from slam_asr.artifacts.manifest import Utterance, manifest_line, parse_line
from slam_asr.artifacts.stage_record import Outcome
from slam_asr.audio import SAMPLE_RATE
from slam_asr.config.recipe import Data, Recipe, dump_recipe
from slam_asr.corpora import SPLITS, CorpusReader, Rejection, Subsets
from slam_asr.corpora.audio_check import check_all
from slam_asr.corpora.splits import Survey, held_out, read_splits, required_splits, survey
from slam_asr.corpora.statistics import CorpusStatistics
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.pages.corpus import write_corpus_page
from slam_asr.progress import log_line
from slam_asr.runtime.external_sort import ExternalSort
from slam_asr.storage import is_s3, write_atomically, write_json

STAGE = "build-manifest"
REJECTED = "rejected.jsonl"
STATISTICS_PAGE = "statistics.html"


def write_manifests(folder: Path, reader: CorpusReader, subsets: Subsets, recipe: Recipe) -> Outcome:
    """Check the utterances of the subsets, and write manifests, statistics and rejections.

    Args:
        folder: the stage's output folder.
        reader: the corpus's reader.
        subsets: names of the subsets of each split.
        recipe: the recipe, whose section `data` is used.

    Raises:
        ConfigurationError: the folder holds other manifests, or `data.text` does not fit the language.
        InputError: too many utterances are rejected, a split has none left, or the corpus contradicts itself.
    """
    _clear(folder)
    _log_subsets(reader, subsets)
    reader.prepare(folder, [subset for names in subsets.values() for subset in names])
    overview = survey(reader, subsets)
    _warn_of_tags(overview, recipe.data)
    statistics = CorpusStatistics()
    with contextlib.ExitStack() as stack:
        splits = {split: stack.enter_context(ExternalSort(folder)) for split in SPLITS}
        rejected = stack.enter_context(ExternalSort(folder))
        items = read_splits(reader, subsets, recipe.data, overview.repeated)
        total = overview.candidates + overview.rejected.total()
        for result in check_all(items, recipe.data, STAGE, folder, total, is_s3(reader.root)):
            if isinstance(result, Rejection):
                key = "\0".join((result.key, result.source, result.reason))
                rejected.add(_bytes(key), json_line(asdict(result)))
                continue
            splits[result.split].add(_bytes(result.utterance.key), manifest_line(result.utterance))
            statistics.resampled += result.utterance.sample_rate != SAMPLE_RATE
            statistics.downmixed += result.channels != 1 and result.utterance.audio_channel is None
        # The list of rejections is written before their number is checked, because the message of the check
        # refers to the list and to the counts that are collected while it is written.
        write_atomically(folder / REJECTED, _count_rejections(rejected, statistics))
        _refuse_too_many(rejected, statistics, total, recipe.data.max_rejected, folder / REJECTED)
        without_dev = bool(recipe.data.train) and not subsets["dev"]
        dev_keys = _dev_keys(splits["train"], recipe.data) if without_dev else set()
        _write_manifests(folder, splits, dev_keys, statistics, required_splits(recipe.data))
    if statistics.downmixed:
        log_line(
            f"{STAGE}: the channels of {statistics.downmixed} utterances are averaged, because the corpus "
            "does not say which channel to use"
        )
    numbers = statistics.as_dict(without_dev)
    write_json(folder / "statistics.json", numbers)
    write_corpus_page(folder / STATISTICS_PAGE, reader.root, reader.kind, recipe, numbers)
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    return _outcome(numbers)


def _bytes(text: str) -> bytes:
    # Python represents a file name that is not UTF-8 with lone surrogates, which plain `encode` refuses.
    return text.encode("utf-8", "backslashreplace")


def _clear(folder: Path) -> None:
    """Remove the manifests of an earlier run, so that none remains if this run fails.

    Raises:
        ConfigurationError: the folder holds manifests that `build-manifest` did not write.
    """
    manifests = [file for split in SPLITS if (file := folder / f"{split}.jsonl").exists()]
    if manifests and not (folder / REJECTED).exists():
        raise ConfigurationError(
            f"{manifests[0]} was not written by {STAGE} and would be replaced: choose another --output."
        )
    others = [folder / name for name in ("statistics.json", STATISTICS_PAGE, "recipe.yaml")]
    for file in manifests + others:
        file.unlink(missing_ok=True)


def _log_subsets(reader: CorpusReader, subsets: Subsets) -> None:
    used = [f"{split} from {', '.join(names)}" for split, names in subsets.items() if names]
    log_line(f"{STAGE}: {reader.kind} {reader.root}: {'; '.join(used)}")
    matched = {name for names in subsets.values() for name in names}
    if unused := [subset for subset in reader.subsets() if subset not in matched]:
        log_line(f"{STAGE}: unused subsets, which the recipe does not select: {', '.join(unused)}")
    for note in reader.notes:
        log_line(f"{STAGE}: {note}")


def _warn_of_tags(overview: Survey, data: Data) -> None:
    """Warn of tags in the transcripts, unless the recipe removes or converts them."""
    if overview.tagged and data.tags == "keep":
        tags = ", ".join(tag for tag, _ in overview.tags.most_common(4))
        log_line(
            f"{STAGE}: warning: {overview.tagged} of {overview.candidates} transcripts have tags ({tags}), "
            "which a model would learn as text: --data.tags drop removes them, --data.tags punctuation also "
            "writes <comma> and the like as punctuation"
        )


def _count_rejections(rejected: ExternalSort, statistics: CorpusStatistics) -> Iterator[bytes]:
    """Yield the lines of rejected.jsonl and count them."""
    for _, line in rejected:
        statistics.add_rejection(Rejection(**json.loads(line)))
        yield line


def _dev_keys(train: ExternalSort, data: Data) -> set[str]:
    """Choose the train utterances that are held out for dev, by key, and log how many."""
    keys = held_out((key.decode() for key, _ in train), data.dev_fraction)
    patterns = ", ".join(data.dev) or "none requested"
    count = f"{len(keys)} of {len(train)} train utterances are held out instead"
    log_line(f"{STAGE}: the corpus has no subset for dev ({patterns}); {count}")
    return keys


def _write_manifests(
    folder: Path,
    splits: dict[str, ExternalSort],
    dev_keys: set[str],
    statistics: CorpusStatistics,
    required: Sequence[str],
) -> None:
    """Write the three manifests and count their utterances.

    Args:
        folder: the stage's output folder.
        splits: keys and lines of each split.
        dev_keys: train utterances that are written to dev instead.
        statistics: the counts to update.
        required: splits that must not be empty.

    Raises:
        InputError: a required split is empty.
    """
    shared = _SharedAudio()
    lines: dict[str, Iterable[tuple[bytes, bytes]]] = dict(splits)
    sizes = {split: len(records) for split, records in splits.items()}
    # Both generators iterate over the same sort, which allows only one iteration at a time. Therefore the
    # manifests are written one after another.
    if dev_keys:
        lines["train"] = ((key, line) for key, line in splits["train"] if key.decode() not in dev_keys)
        lines["dev"] = ((key, line) for key, line in splits["train"] if key.decode() in dev_keys)
        sizes |= {"train": sizes["train"] - len(dev_keys), "dev": len(dev_keys)}
    for split in required:
        if not sizes[split]:
            reasons = statistics.reasons() or "the corpus has too few"
            raise InputError(
                f"No utterance is left for {split} ({reasons}; see {folder / REJECTED}): correct the corpus, "
                "or choose other subsets with --data.train, --data.dev and --data.test."
            )
    for split in SPLITS:
        write_atomically(folder / f"{split}.jsonl", _count_lines(split, lines[split], statistics, shared))
    shared.warn()


def _count_lines(
    split: str, lines: Iterable[tuple[bytes, bytes]], statistics: CorpusStatistics, shared: "_SharedAudio"
) -> Iterator[bytes]:
    """Yield the lines of a manifest and count their utterances."""
    for _, line in lines:
        utterance = parse_line(line)
        statistics.add(split, utterance)
        shared.add(split, utterance)
        yield line


class _SharedAudio:
    """Finds dev and test utterances whose audio is also in train, perhaps under another key."""

    def __init__(self) -> None:
        self._train = array("q")
        """Hashes of the audio in train, 8 bytes per utterance."""
        self._sorted_train: np.ndarray | None = None
        self._keys: list[str] = []
        self._count = 0

    def add(self, split: str, utterance: Utterance) -> None:
        """Add an utterance. All train utterances must be added before those of other splits."""
        # Hashes of text differ between Python processes, but these are used only in this one. The duration is
        # part of a segment's hash, but not of a complete file's, whose SHA-256 already determines it.
        duration = None if utterance.start is None else utterance.duration
        audio = hash((utterance.sha256, utterance.start, duration, utterance.audio_channel))
        if split == "train":
            self._train.append(audio)
            return
        if self._sorted_train is None:
            self._sorted_train = np.sort(np.frombuffer(self._train, np.int64))
        i = int(np.searchsorted(self._sorted_train, audio))
        if i < len(self._sorted_train) and self._sorted_train[i] == audio:
            self._count += 1
            if len(self._keys) < 3:
                self._keys.append(utterance.key)

    def warn(self) -> None:
        if self._count:
            text = f"{self._count} dev and test utterances have the same audio as train utterances"
            log_line(f"{STAGE}: warning: {text}: {', '.join(self._keys)}")


def _refuse_too_many(
    rejected: ExternalSort, statistics: CorpusStatistics, total: int, max_share: float, list_file: Path
) -> None:
    if len(rejected) <= max_share * total:
        return
    first = [json.loads(line)["key"] for _, (_, line) in zip(range(3), rejected, strict=False)]
    names = ", ".join(first) + (", …" if len(rejected) > 3 else "")
    raise InputError(
        f"{len(rejected)} of {total} utterances cannot be used ({statistics.reasons()}; {names}), "
        f"more than the {max_share:.1%} allowed: correct those listed in {list_file}, or raise "
        "--data.max_rejected."
    )


def _outcome(statistics: dict[str, Any]) -> Outcome:
    splits, rejected = statistics["splits"], statistics["rejected"]["total"]
    counts = {split: measures["utterances"] for split, measures in splits.items()}
    hours = {split: measures["hours"] for split, measures in splits.items()}
    utterances = ", ".join(f"{counts[split]} {split}" for split in SPLITS if split in counts)
    metrics = {f"{split}_{name}": splits[split][name] for split in splits for name in ("utterances", "hours")}
    return Outcome(
        summary=f"{utterances} utterances, {sum(hours.values()):.2f} h; {rejected} rejected",
        metrics=metrics | {"rejected": rejected},
        facts={
            "hours": hours,
            "utterances": counts,
            "subsets": {split: list(measures["subsets"]) for split, measures in splits.items()},
            "rejected": statistics["rejected"],
            "dev_held_out_of_train": statistics["dev_held_out_of_train"],
        },
    )
