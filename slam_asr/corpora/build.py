"""The stage `build-manifest`: a corpus becomes manifests whose audio is known to be good.

Every file is decoded once, here, so that no later stage meets a damaged one hours into its work.
What cannot be used is set aside with its reason; too much of it, and the stage fails.
"""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr.corpora import AUDIO_SUFFIXES, SPLITS, Reader, Rejection
from slam_asr.corpora.checking import Checked, check_all
from slam_asr.corpora.jsonlines import JsonLines
from slam_asr.corpora.librispeech import LibriSpeech
from slam_asr.corpora.splits import choose_subsets, held_out, read_splits
from slam_asr.corpora.statistics import corpus_statistics
from slam_asr.errors import UserError
from slam_asr.manifest import write_json_lines, write_manifest
from slam_asr.progress import say
from slam_asr.recipe import Data, Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, run_stage
from slam_asr.storage import digest, local_path, write_atomically, write_json

STAGE = "build-manifest"
READERS = (LibriSpeech, JsonLines)
REJECTED = "rejected.jsonl"
_ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz")


def build_manifest(recipe: Recipe, corpus: str, output: str, overwrite: bool = False) -> Record:
    """Check every utterance of a corpus and write the manifests for training, validation and test.

    Writes train.jsonl, dev.jsonl and test.jsonl, rejected.jsonl (what was set aside and why),
    statistics.json and recipe.yaml.

    Args:
        recipe: the recipe; its `data` section chooses subsets, limits and the case of transcripts.
        corpus: a LibriSpeech tree, one subset of it, or JSON lines (a folder of .jsonl files or one file).
        output: the folder to write to; `{fingerprint}` in it stands for the digest of the inputs.
        overwrite: replace the results of other inputs in that folder.

    Raises:
        UserError: no such corpus, a subset that the recipe needs is not there, an utterance in two
            splits, too many bad utterances, or a split without any.
    """
    reader = open_corpus(corpus)
    root = reader.root
    if FINGERPRINT not in output and local_path(output).resolve() == _folder_of(root).resolve():
        raise UserError(f"{output} is the corpus's own folder, whose files would be replaced: choose another --output.")
    chosen = choose_subsets(reader, recipe.data)
    stamps = {subset: list(reader.stamps(subset)) for names in chosen.values() for subset in names}
    inputs = {"corpus": str(root), "listing": digest(stamps), "data": asdict(recipe.data)}
    return run_stage(STAGE, output, inputs, lambda folder: _build(folder, reader, chosen, recipe), overwrite)


def open_corpus(corpus: str) -> Reader:
    """The reader of what lies at a path.

    Raises:
        UserError: nothing is there, or nothing that any reader knows.
    """
    root = Path(os.path.abspath(local_path(corpus)))
    if not root.exists():
        raise UserError(f"There is no corpus {root}: check --corpus.")
    for kind in READERS:
        if reader := kind.find(root):
            if not reader.subsets():
                raise UserError(f"{root} is empty: its .jsonl files hold no utterance.")
            return reader
    wanted = "give a LibriSpeech tree (<subset>/<speaker>/<chapter>/ with .trans.txt and audio files) or .jsonl files"
    if root.is_file():
        if root.name.endswith(_ARCHIVES):
            raise UserError(f"The corpus {root} is an archive: unpack it, and name the folder.")
        raise UserError(f"The corpus {root} is a file of an unknown kind: {wanted}.")
    names = sorted(f.name for f in root.iterdir())
    if not names:
        raise UserError(f"The corpus {root} is empty, without audio and transcripts: {wanted}.")
    if archives := [n for n in names if n.endswith(_ARCHIVES)]:
        raise UserError(f"The corpus {root} holds archives ({', '.join(archives[:3])}): unpack them first.")
    if audio := next((f for _, _, files in os.walk(root) for f in files if f.lower().endswith(AUDIO_SUFFIXES)), None):
        raise UserError(
            f"The corpus {root} holds audio ({audio}, …) but no transcripts laid out in a known way: {wanted}."
        )
    raise UserError(f"The corpus {root} holds no audio and no transcripts laid out in a known way: {wanted}.")


def _build(folder: Path, reader: Reader, chosen: dict[str, list[str]], recipe: Recipe) -> Outcome:
    _clear(folder)
    _say_what_is_used(reader, chosen)
    candidates, rejected = read_splits(reader, chosen, recipe.data)
    results = check_all([candidate for _, candidate in candidates], recipe.data, STAGE)
    splits: dict[str, list[Checked]] = {split: [] for split in SPLITS}
    for (split, _), result in zip(candidates, results, strict=True):
        if isinstance(result, Rejection):
            rejected.append(result)
        else:
            splits[split].append(result)
    rejected.sort(key=lambda r: (r.key, r.source, r.reason))
    write_json_lines(folder / REJECTED, map(asdict, rejected))
    total = len(rejected) + sum(map(len, splits.values()))
    _refuse_too_many(rejected, total, recipe.data.max_rejected, folder / REJECTED)
    without_dev = not chosen["dev"]
    if without_dev:
        _hold_out_dev(splits, recipe.data)
    _require_every_split(splits, rejected, folder / REJECTED)
    _warn_of_shared_audio(splits)
    for split, checked in splits.items():
        write_manifest(folder / f"{split}.jsonl", (c.utterance for c in checked))
    statistics = corpus_statistics(splits, rejected, without_dev)
    write_json(folder / "statistics.json", statistics)
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    return _outcome(statistics)


def _folder_of(root: Path) -> Path:
    return root if root.is_dir() else root.parent


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, so that a run that fails leaves no manifest behind."""
    left = [file for split in SPLITS if (file := folder / f"{split}.jsonl").exists()]
    if left and not (folder / REJECTED).exists():
        raise UserError(f"{left[0]} was not written by {STAGE} and would be replaced: choose another --output.")
    for file in (*left, folder / "statistics.json", folder / "recipe.yaml"):
        file.unlink(missing_ok=True)


def _say_what_is_used(reader: Reader, chosen: dict[str, list[str]]) -> None:
    used = [f"{split} from {', '.join(names)}" for split, names in chosen.items() if names]
    say(f"{STAGE}: {reader.kind} {reader.root}: {'; '.join(used)}")
    named = {name for names in chosen.values() for name in names}
    if unused := [subset for subset in reader.subsets() if subset not in named]:
        say(f"{STAGE}: not used, since no pattern of the recipe names them: {', '.join(unused)}")


def _hold_out_dev(splits: dict[str, list[Checked]], data: Data) -> None:
    train = splits["train"]
    chosen = held_out([checked.utterance.key for checked in train], data.dev_fraction)
    splits["dev"] = [checked for checked in train if checked.utterance.key in chosen]
    splits["train"] = [checked for checked in train if checked.utterance.key not in chosen]
    patterns = ", ".join(data.dev) or "none asked for"
    held = f"{len(chosen)} of {len(train)} train utterances are held out for it"
    say(f"{STAGE}: the corpus has no subset for dev ({patterns}); {held}")


def _refuse_too_many(rejected: list[Rejection], total: int, allowed: float, listed: Path) -> None:
    if len(rejected) <= allowed * total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in rejected).most_common())
    names = ", ".join(r.key for r in rejected[:3]) + (", …" if len(rejected) > 3 else "")
    raise UserError(
        f"{len(rejected)} of {total} utterances cannot be used ({reasons}; {names}), more than the "
        f"{allowed:.1%} allowed: mend the corpus by the list in {listed}, or raise --data.max_rejected."
    )


def _require_every_split(splits: dict[str, list[Checked]], rejected: list[Rejection], listed: Path) -> None:
    for split, checked in splits.items():
        if not checked:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in rejected).items())
            raise UserError(
                f"No utterance is left for {split} ({reasons or 'too few to hold any out'}; see {listed}): "
                f"mend the corpus, or choose other subsets with --data.train, --data.dev and --data.test."
            )


def _warn_of_shared_audio(splits: dict[str, list[Checked]]) -> None:
    """Say where a test file is also trained on: under another key nothing else would show it."""
    heard = {checked.utterance.sha256 for checked in splits["train"]}
    shared = [c.utterance.key for split in ("dev", "test") for c in splits[split] if c.utterance.sha256 in heard]
    if shared:
        names = ", ".join(shared[:3])
        say(f"{STAGE}: warning: {len(shared)} dev and test utterances have the very audio of train utterances: {names}")


def _outcome(statistics: dict[str, Any]) -> Outcome:
    splits, rejected = statistics["splits"], statistics["rejected"]["total"]
    counts = {split: measures["utterances"] for split, measures in splits.items()}
    hours = {split: measures["hours"] for split, measures in splits.items()}
    summary = (
        f"{counts['train']} train, {counts['dev']} dev, {counts['test']} test utterances, {sum(hours.values()):.2f} h"
    )
    metrics = {f"{split}_{name}": splits[split][name] for split in SPLITS for name in ("utterances", "hours")}
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
