"""Several decoded training runs on one page: ranked, compared with the best one, with their curves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slam_asr.artifacts.hypotheses import Hypothesis, read_hypotheses
from slam_asr.config.variations import Variation
from slam_asr.pages.curves import RUN_MARKERS, draw_runs, is_number, thinned
from slam_asr.pages.render import render, with_thousands
from slam_asr.progress import clock
from slam_asr.scoring.comparison import Compared, compare_pairs, pair, probability_text
from slam_asr.scoring.report import escape_markdown, interval_text, markdown_table, rate_text, short_name
from slam_asr.storage import write_atomically, write_json

PAGE, MARKDOWN, RUNS = "runs.html", "runs.md", "runs.json"

_LAST_ON_DEV = ("loss", "accuracy", "wer", "cer")


@dataclass
class Run:
    """A training run whose model was decoded and scored."""

    name: str
    folder: str
    changes: str
    """What this run changed in the recipe, in words; empty if unknown."""
    numbers: dict[str, Any]
    """The content of its wer.json."""
    rows: list[Hypothesis]
    against_best: Compared | None = None
    """The best run (first) compared with this one (second).

    None for the best run itself, and for a run that was decoded on another test set.
    """

    @property
    def rate(self) -> float:
        """The error rate of the complete test set in percent, counted in words or characters."""
        return rate_of(self.numbers["all"])

    @property
    def training(self) -> dict[str, Any]:
        """Facts about the training of this run, from its report."""
        return self.numbers.get("training") or {}

    def summary(self) -> dict[str, Any]:
        """Return the numbers of this run's row in the table.

        Rates are in percent, except that those on the dev set are fractions; time is in seconds.
        """
        total = self.numbers["all"]
        dev = (self.training.get("validation") or [{}])[-1]
        shuffled = self.numbers["controls"].get("shuffled audio")
        comparison = self.against_best
        return {
            "name": self.name,
            "changes": self.changes,
            "folder": self.folder,
            "unit": self.numbers.get("unit", "words"),
            "rate": self.rate,
            "wer": total["wer"],
            "interval": total["interval"],
            "normalised": total["normalised"],
            "cer": total["cer"],
            "shuffled": rate_of(shuffled["all"]) if shuffled else None,
            "subsets": {name: rate_of(counts) for name, counts in self.numbers["subsets"].items() if name},
            "dev": {key: dev[key] for key in _LAST_ON_DEV if is_number(dev.get(key))},
            "steps": self.training.get("steps"),
            "seconds": self.training.get("seconds"),
            "worse_by": round(comparison.second - comparison.first, 2) if comparison else None,
            "p": comparison.p if comparison else None,
        }


def rate_of(counts: dict[str, Any]) -> Any:
    """Return the rate from counts in a `wer.json`; None if the references have no words.

    Older files have only `wer`.
    """
    return counts.get("rate", counts["wer"])


def read_runs(files: dict[str, tuple[Path, Path]], known: dict[str, Variation]) -> list[Run]:
    """Read the runs, sort them by error rate, and compare each with the best.

    Args:
        files: wer.json and hypotheses.jsonl of each run, keyed by the run's folder.
        known: variations of the recipe by name, to describe what a run changed.
    """
    numbers = {folder: json.loads(file.read_text(encoding="utf-8")) for folder, (file, _) in files.items()}
    titles = [values["title"] for values in numbers.values()]
    runs = []
    for folder, values in numbers.items():
        title = values["title"]
        # Runs with the same title are distinguished by the names of their folders.
        name = title if titles.count(title) == 1 else f"{title} ({folder.rstrip('/').rpartition('/')[2]})"
        changes = known[title].describe() if title in known else ""
        runs.append(Run(name, folder, changes, values, read_hypotheses(files[folder][1])))
    # Runs with equal rates are sorted by name, so that their order does not depend on that of the folders.
    runs.sort(key=lambda run: (run.rate, run.name))
    best = runs[0]
    for run in runs[1:]:
        if _references(best) == _references(run):
            # The last comparison is the one over all subsets. The seed is fixed, so that the page is the same
            # each time.
            pairs, _ = pair((best.name, best.rows), (run.name, run.rows), common=False)
            run.against_best = compare_pairs(pairs, best.name, seed=0)[-1]
    return runs


def _references(run: Run) -> dict[tuple[str, str], str]:
    """Return the references of a run's utterances. Two runs can be compared if these are the same."""
    return {(row.key, row.subset): row.reference for row in run.rows}


def write_comparison(folder: Path, title: str, runs: Sequence[Run]) -> None:
    """Write `runs.html`, `runs.md` and `runs.json`; `runs` are in the order of `read_runs`."""
    rows = [run.summary() for run in runs]
    trainings = {
        run.name: {key: thinned(run.training.get(key) or []) for key in ("curve", "validation")}
        for run in runs
    }
    # Runs that decode one model with different options share its training, so their curves are the same.
    same_training = len({json.dumps(training) for training in trainings.values()}) == 1
    has_subsets = any(len(row["subsets"]) > 1 for row in rows)
    subsets = sorted({name for row in rows for name in row["subsets"]}) if has_subsets else []
    dev = [key for key in _LAST_ON_DEV if any(key in row["dev"] for row in rows)]
    page = render(
        PAGE,
        filters={
            "rate": rate_text,
            "interval": interval_text,
            "clock": clock,
            "probability": probability_text,
        },
        title=title,
        rows=rows,
        short=short_name(runs[0].numbers),
        long={"WER": "word error rate", "CER": "character error rate"}[short_name(runs[0].numbers)],
        subsets=subsets,
        dev=dev,
        markers=RUN_MARKERS,
        curves=[] if same_training else draw_runs(trainings),
        same_test=all(run.against_best for run in runs[1:]),
    )
    write_atomically(folder / PAGE, page)
    write_atomically(folder / MARKDOWN, _markdown(title, rows, subsets))
    write_json(folder / RUNS, {"title": title, "unit": "percent", "runs": rows})


def _markdown(title: str, rows: Sequence[dict[str, Any]], subsets: Sequence[str]) -> str:
    by_words = rows[0]["unit"] == "words"
    table = [
        [
            ("Run", escape_markdown(row["name"])),
            ("Changes", escape_markdown(row["changes"])),
            ("WER, %" if by_words else "CER, %", rate_text(row["rate"])),
            ("95 % interval", interval_text(row["interval"])),
            *((f"{escape_markdown(name)}, %", rate_text(row["subsets"].get(name))) for name in subsets),
            ("Worse by", rate_text(row["worse_by"])),
            ("p", probability_text(row["p"])),
            *([("CER, %", rate_text(row["cer"]))] if by_words else []),
            ("Steps", "–" if row["steps"] is None else with_thousands(row["steps"])),
            ("Training", "–" if row["seconds"] is None else clock(row["seconds"])),
        ]
        for row in rows
    ]
    heading = f"# {escape_markdown(title)}: {len(rows)} runs"
    return "\n".join([heading, "", *markdown_table(table, texts=2)]) + "\n"
