"""`slam-asr score`: transcripts that were decoded in parts become one word error rate and one report."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr.conversion.model import read_config
from slam_asr.errors import UserError
from slam_asr.recipe import Decoding, Recipe
from slam_asr.scoring.controls import EMPTY, SHUFFLED, empty_output, shuffled_audio
from slam_asr.scoring.report import write_report
from slam_asr.scoring.report_audio import AUDIO, Name, read_audio
from slam_asr.scoring.wer import Hypothesis, read_hypotheses, write_for_slam_llm, write_hypotheses
from slam_asr.stage import Outcome, Record, require_record, run_stage
from slam_asr.storage import exists, fetch_folder, join, sha256_of_file, write_atomically

STAGE = "score"
HYPOTHESES, NBEST = "hypotheses.jsonl", "nbest.jsonl"

_SUMMED = (
    "seconds",
    "audio_hours",
    "hours_decoded",
    "utterances",
    "answers_cut",
    "empty_answers",
    "close_calls",
)


def score_parts(recipe: Recipe, model: str, parts: list[str], output: str, overwrite: bool = False) -> Record:
    """Join the parts of a decoding, score them, and write the report.

    Args:
        recipe: published word error rates to show, and which controls to score;
            on the command line, the recipe that the model was trained with unless another is named.
        model: folder that convert-checkpoint wrote; what it says of its training stands in the report.
        parts: folders that `decode --shard i/n` wrote, all n of them.
        output: folder for the report; {fingerprint} in it becomes a digest of the inputs.
        overwrite: replace results of other inputs.

    Returns:
        The stage's record; its folder holds hypotheses.jsonl, wer.json, report.html and report.md.

    Raises:
        UserError: parts that are missing, or that stem from different models, manifests or options.
    """
    config = read_config(str(fetch_folder(model)))
    records = _whole([require_record(part, "decode") for part in parts])
    files = [record.file(HYPOTHESES) for record in records]
    inputs = {
        "parts": [sha256_of_file(file) for file in files],
        "title": recipe.name,
        "training": config.training,
        "published": recipe.published_wer,
        "controls": controls_of(recipe.decoding),
    }

    def work(folder: Path) -> Outcome:
        rows = [row for file in files for row in read_hypotheses(file)]
        write_hypotheses(folder / HYPOTHESES, rows)
        if choices := _everywhere(records, NBEST):
            write_atomically(
                folder / NBEST,
                "".join(
                    sorted(line for file in choices for line in file.read_text().splitlines(keepends=True))
                ),
            )
        return report(
            folder, recipe, rows, config.training, _joined(records), read_audio(_everywhere(records, AUDIO))
        )

    return run_stage(STAGE, output, inputs, work, overwrite)


def _everywhere(records: Sequence[Record], name: str) -> list[Path]:
    """A file of each part that has it."""
    return [record.file(name) for record in records if exists(join(record.folder, name))]


def report(
    folder: Path,
    recipe: Recipe,
    rows: Sequence[Hypothesis],
    training: dict[str, Any],
    facts: dict[str, Any],
    audio: dict[Name, str] | None = None,
) -> Outcome:
    """Write the report of all utterances, whose order does not matter, beside its controls.

    Args:
        folder: where to.
        recipe: its name, published rates and controls.
        rows: what was decoded.
        training: what the model says of its training.
        facts: how it was decoded.
        audio: of some of the utterances, for the page.
    """
    rows = sorted(rows, key=lambda row: (row.key, row.subset))
    controls = {EMPTY: empty_output(rows)}
    if recipe.decoding.shuffled_control and (shuffled := shuffled_audio(rows, recipe.decoding.seed)):
        controls = {SHUFFLED: shuffled, **controls}
    metrics = write_report(folder, recipe.name, rows, controls, training, recipe.published_wer, facts, audio)
    write_for_slam_llm(folder, rows)
    return Outcome(f"WER {metrics['wer']:.2f} % on {len(rows)} utterances", metrics, facts)


def controls_of(decoding: Decoding) -> dict[str, Any]:
    """What decides which controls are scored."""
    return {"shuffled": decoding.shuffled_control, "seed": decoding.seed}


def what_decides_the_texts(decoding: Decoding) -> dict[str, Any]:
    """The options without those that leave the texts as they are."""
    return {
        key: value
        for key, value in asdict(decoding).items()
        if key not in ("checkpoint", "parts", "processes", "shuffled_control", "seed", "report_audio")
    }


def rates(facts: dict[str, Any]) -> dict[str, float]:
    """A part's numbers for the dashboard: how much, and how fast."""
    hours, seconds = facts["hours_decoded"], facts["seconds"]
    return {
        "utterances": facts["utterances"],
        "answers cut": facts["answers_cut"],
        "empty answers": facts["empty_answers"],
        "times real time": round(hours * 3600 / seconds, 2) if seconds else math.inf,
    }


def _joined(records: Sequence[Record]) -> dict[str, Any]:
    facts = dict(records[0].facts)
    return facts | {
        key: round(sum(record.facts[key] for record in records), 4) for key in _SUMMED if key in facts
    }


def _whole(records: list[Record]) -> list[Record]:
    """The parts in their order.

    Raises:
        UserError: no part, one that is missing or there twice, or parts of different decodings.
    """
    if not records:
        raise UserError(
            "There is nothing to score: --parts names no folder of `slam-asr decode --shard i/n`."
        )
    numbers = {}
    for record in records:
        if "part" not in record.inputs:
            raise UserError(
                f"{record.folder} holds a whole decoding, which has its report already: give the folders of `decode --shard i/n`."
            )
        number, of = (int(n) for n in record.inputs["part"].split("-of-"))
        if number in numbers:
            raise UserError(
                f"{record.folder} and {numbers[number].folder} are the same part {record.inputs['part']}: give each part once."
            )
        numbers[number] = record
        other = records[0]
        changed = sorted(
            k
            for k in record.inputs | other.inputs
            if k != "part" and record.inputs.get(k) != other.inputs.get(k)
        )
        if changed or of != int(other.inputs["part"].split("-of-")[1]):
            raise UserError(
                f"{record.folder} and {other.folder} are parts of different decodings ({', '.join(changed) or 'number of parts'} differ): decode all with the same inputs."
            )
    absent = [f"{number}/{of}" for number in range(1, of + 1) if number not in numbers]
    if absent:
        raise UserError(
            f"The decoding lacks {len(absent)} of {of} parts, first {absent[0]}: run `slam-asr decode --shard {absent[0]}` with the other options as they were."
        )
    return [numbers[number] for number in sorted(numbers)]
