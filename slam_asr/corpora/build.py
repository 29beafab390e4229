"""The stage `build-manifest`: a corpus becomes manifests whose audio is known to be good.

Every file is decoded once, here, so that no later stage meets a damaged one hours into its work.
What cannot be used is set aside with its reason; too much of it, and the stage fails. Utterances
pass one by one and are sorted through local disk: memory does not grow with the corpus, but for a
few bytes an utterance.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slam_asr.audio import SAMPLE_RATE
from slam_asr.corpora import SPLITS, CorpusReader, Rejection
from slam_asr.corpora.audio_check import check_all
from slam_asr.corpora.detection import open_corpus
from slam_asr.corpora.places import is_folder
from slam_asr.corpora.splits import choose_subsets, held_out, read_splits, survey, wanted_splits
from slam_asr.corpora.statistics import CorpusStatistics
from slam_asr.errors import UserError
from slam_asr.external_sort import ExternalSort
from slam_asr.manifest import Utterance, json_line, manifest_line, parse_line, write_lines
from slam_asr.pages.corpus import write_corpus_page
from slam_asr.progress import log_line
from slam_asr.recipe import Data, Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, run_stage
from slam_asr.storage import is_s3, local_path, parent_of, write_atomically, write_json

STAGE = "build-manifest"
REJECTED = "rejected.jsonl"
STATISTICS_PAGE = "statistics.html"


def build_manifest(recipe: Recipe, corpus: str, output: str, overwrite: bool = False) -> Record:
    """Check every utterance of a corpus and write the manifests for training, validation and test.

    Writes train.jsonl, dev.jsonl and test.jsonl, rejected.jsonl (what was set aside and why),
    statistics.json, statistics.html and recipe.yaml; and below audio/ what was unpacked from archives or tables.

    Args:
        recipe: the recipe; its `data` section chooses subsets, limits and how transcripts are written.
        corpus: a folder, a file or an s3:// prefix: LibriSpeech (a tree or its archives), a table, JSON lines, Kaldi's lists,
            Lhotse's cuts, a Hugging Face dataset, or audio with text files beside.
        output: the folder to write to; `{fingerprint}` in it stands for the digest of the inputs.
        overwrite: replace the results of other inputs in that folder.

    Raises:
        UserError: no such corpus, a subset that the recipe needs is not there, an utterance in two
            splits, too many bad utterances, or a split without any.
    """
    reader = open_corpus(corpus, recipe.data)
    if FINGERPRINT not in output and _is_corpus_folder(output, reader.root):
        raise UserError(
            f"{output} is the corpus's own folder, whose files would be replaced: choose another --output."
        )
    chosen = choose_subsets(reader, recipe.data)
    inputs = {"corpus": reader.root, "listing": _listing(reader, chosen), "data": asdict(recipe.data)}
    return run_stage(STAGE, output, inputs, lambda folder: _build(folder, reader, chosen, recipe), overwrite)


def _is_corpus_folder(output: str, root: str) -> bool:
    folder = root if is_folder(root) else parent_of(root)
    if is_s3(output) or is_s3(folder):
        return output.rstrip("/") == folder.rstrip("/")
    return local_path(output).resolve() == Path(folder).resolve()


def _listing(reader: CorpusReader, chosen: dict[str, list[str]]) -> str:
    """A digest of all files that the chosen subsets depend on."""
    known = hashlib.sha256()
    for subset in sorted(subset for names in chosen.values() for subset in names):
        for line in ([subset], *reader.stamps(subset)):
            known.update(json.dumps(line).encode() + b"\n")
    return known.hexdigest()


def _build(folder: Path, reader: CorpusReader, chosen: dict[str, list[str]], recipe: Recipe) -> Outcome:
    _clear(folder)
    _say_what_is_used(reader, chosen)
    reader.prepare(folder, [subset for names in chosen.values() for subset in names])
    found = survey(reader, chosen)
    statistics = CorpusStatistics()
    with contextlib.ExitStack() as stack:
        splits = {split: stack.enter_context(ExternalSort(folder)) for split in SPLITS}
        rejected = stack.enter_context(ExternalSort(folder))
        items = read_splits(reader, chosen, recipe.data, found.repeated)
        total = found.candidates + found.rejected.total()
        for result in check_all(items, recipe.data, STAGE, folder, total, is_s3(reader.root)):
            if isinstance(result, Rejection):
                rejected.add(
                    _bytes("\0".join((result.key, result.source, result.reason))), json_line(asdict(result))
                )
                continue
            splits[result.split].add(_bytes(result.utterance.key), manifest_line(result.utterance))
            statistics.resampled += result.utterance.sample_rate != SAMPLE_RATE
            statistics.mixed += result.channels != 1
        write_lines(folder / REJECTED, _counted(rejected, statistics))
        _refuse_too_many(rejected, statistics, total, recipe.data.max_rejected, folder / REJECTED)
        without_dev = bool(recipe.data.train) and not chosen["dev"]
        apart = _held_out_dev(splits["train"], recipe.data) if without_dev else set()
        _write_manifests(folder, splits, apart, statistics, wanted_splits(recipe.data))
    numbers = statistics.as_dict(without_dev)
    write_json(folder / "statistics.json", numbers)
    write_corpus_page(folder / STATISTICS_PAGE, reader.root, reader.kind, recipe, numbers)
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    return _outcome(numbers)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, so that a run that fails leaves no manifest behind."""
    left = [file for split in SPLITS if (file := folder / f"{split}.jsonl").exists()]
    if left and not (folder / REJECTED).exists():
        raise UserError(
            f"{left[0]} was not written by {STAGE} and would be replaced: choose another --output."
        )
    for file in (*left, *(folder / name for name in ("statistics.json", STATISTICS_PAGE, "recipe.yaml"))):
        file.unlink(missing_ok=True)


def _say_what_is_used(reader: CorpusReader, chosen: dict[str, list[str]]) -> None:
    used = [f"{split} from {', '.join(names)}" for split, names in chosen.items() if names]
    log_line(f"{STAGE}: {reader.kind} {reader.root}: {'; '.join(used)}")
    named = {name for names in chosen.values() for name in names}
    if unused := [subset for subset in reader.subsets() if subset not in named]:
        log_line(f"{STAGE}: not used, since no pattern of the recipe names them: {', '.join(unused)}")


def _counted(rejected: ExternalSort, statistics: CorpusStatistics) -> Iterator[bytes]:
    for _, line in rejected:
        statistics.set_aside(Rejection(**json.loads(line)))
        yield line


def _held_out_dev(train: ExternalSort, data: Data) -> set[str]:
    """The keys of the train utterances that become dev."""
    chosen = held_out((key.decode() for key, _ in train), data.dev_fraction)
    patterns = ", ".join(data.dev) or "none asked for"
    held = f"{len(chosen)} of {len(train)} train utterances are held out for it"
    log_line(f"{STAGE}: the corpus has no subset for dev ({patterns}); {held}")
    return chosen


def _write_manifests(
    folder: Path,
    splits: dict[str, ExternalSort],
    apart: set[str],
    statistics: CorpusStatistics,
    wanted: Sequence[str],
) -> None:
    """Write the three manifests, and count what is in them.

    Args:
        folder: the stage's.
        splits: sorted lines of each.
        apart: keys of train utterances that go to dev.
        statistics: counts.
        wanted: splits that may not be empty.
    """
    shared = _SharedAudio()
    lines: dict[str, Iterable[tuple[bytes, bytes]]] = dict(splits)
    if apart:
        lines["train"] = ((key, line) for key, line in splits["train"] if key.decode() not in apart)
        lines["dev"] = ((key, line) for key, line in splits["train"] if key.decode() in apart)
    sizes = {split: len(lines) for split, lines in splits.items()}
    if apart:
        sizes |= {"train": sizes["train"] - len(apart), "dev": len(apart)}
    _require_every_split({split: sizes[split] for split in wanted}, statistics, folder / REJECTED)
    for split in SPLITS:
        write_lines(folder / f"{split}.jsonl", _counted_lines(split, lines[split], statistics, shared))
    shared.warn()


def _counted_lines(
    split: str, lines: Iterable[tuple[bytes, bytes]], statistics: CorpusStatistics, shared: "_SharedAudio"
) -> Iterator[bytes]:
    for _, line in lines:
        utterance = parse_line(line)
        statistics.add(split, utterance)
        shared.add(split, utterance)
        yield line


class _SharedAudio:
    """Where a test file is also trained on: under another key nothing else would show it."""

    def __init__(self) -> None:
        self._train = array("q")
        self._heard: np.ndarray | None = None
        self._keys: list[str] = []
        self._count = 0

    def add(self, split: str, utterance: Utterance) -> None:
        """Take an utterance; all of train come first."""
        heard = hash((utterance.sha256, utterance.start, utterance.start and utterance.duration))
        if split == "train":
            self._train.append(heard)
            return
        if self._heard is None:
            self._heard = np.sort(np.frombuffer(self._train, np.int64))
        place = int(np.searchsorted(self._heard, heard))
        if place < len(self._heard) and self._heard[place] == heard:
            self._count += 1
            if len(self._keys) < 3:
                self._keys.append(utterance.key)

    def warn(self) -> None:
        if self._count:
            very = f"{self._count} dev and test utterances have the very audio of train utterances"
            log_line(f"{STAGE}: warning: {very}: {', '.join(self._keys)}")


def _refuse_too_many(
    rejected: ExternalSort, statistics: CorpusStatistics, total: int, allowed: float, listed: Path
) -> None:
    if len(rejected) <= allowed * total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in statistics.reasons())
    first = [json.loads(line)["key"] for _, (_, line) in zip(range(3), rejected, strict=False)]
    names = ", ".join(first) + (", …" if len(rejected) > 3 else "")
    raise UserError(
        f"{len(rejected)} of {total} utterances cannot be used ({reasons}; {names}), more than the "
        f"{allowed:.1%} allowed: mend the corpus by the list in {listed}, or raise --data.max_rejected."
    )


def _require_every_split(sizes: dict[str, int], statistics: CorpusStatistics, listed: Path) -> None:
    for split, size in sizes.items():
        if not size:
            reasons = ", ".join(f"{n} {reason}" for reason, n in statistics.reasons())
            raise UserError(
                f"No utterance is left for {split} ({reasons or 'too few to hold any out'}; see {listed}): "
                f"mend the corpus, or choose other subsets with --data.train, --data.dev and --data.test."
            )


def _outcome(statistics: dict[str, Any]) -> Outcome:
    splits, rejected = statistics["splits"], statistics["rejected"]["total"]
    counts = {split: measures["utterances"] for split, measures in splits.items()}
    hours = {split: measures["hours"] for split, measures in splits.items()}
    summary = f"{', '.join(f'{counts[split]} {split}' for split in SPLITS if split in counts)} utterances, {sum(hours.values()):.2f} h"
    metrics = {f"{split}_{name}": splits[split][name] for split in splits for name in ("utterances", "hours")}
    return Outcome(
        summary=f"{summary}; {rejected} set aside",
        metrics=metrics | {"rejected": rejected},
        facts={
            "hours": hours,
            "utterances": counts,
            "subsets": {split: list(measures["subsets"]) for split, measures in splits.items()},
            "rejected": statistics["rejected"],
            "dev_held_out_of_train": statistics["dev_held_out_of_train"],
        },
    )
