"""The stage `score`: joins the work shards of a decoding into one word error rate and one report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slam_asr.artifacts.hypotheses import (
    HYPOTHESES,
    NBEST,
    Hypothesis,
    read_hypotheses,
    write_for_slam_llm,
    write_hypotheses,
)
from slam_asr.artifacts.model_folder import read_config
from slam_asr.artifacts.stage_record import Outcome, Record, different_inputs, require_record, run_stage
from slam_asr.artifacts.writing_systems import separates_words
from slam_asr.config.recipe import Recipe
from slam_asr.errors import InputError
from slam_asr.scoring.controls import EMPTY, SHUFFLED, empty_output, shuffled_audio
from slam_asr.scoring.report import write_report
from slam_asr.scoring.report_audio import AUDIO, read_audio
from slam_asr.storage import exists, fetch_folder, join, sha256_of_file, write_atomically

STAGE = "score"

_TIMES = ("seconds", "audio_hours", "hours_decoded")
_COUNTS = ("utterances", "answers_cut", "empty_answers", "close_calls")
"""Facts of a decoding that are added up over its work shards: times, and counts."""


def score(recipe: Recipe, model: str, parts: list[str], output: str, overwrite: bool = False) -> Record:
    """Join the work shards of a decoding, compute the word error rate, and write the report.

    Args:
        recipe: published word error rates to show, and which controls to score; on the command line, the
            recipe that the model was trained with, unless another is named.
        model: folder that convert-checkpoint wrote; the report shows how it was trained.
        parts: folder that decode wrote; after `decode --work-shard i/n`, all n folders.
        output: folder for the report; {fingerprint} in it is replaced by a digest of the inputs.
        overwrite: replace results of other inputs instead of refusing.

    Returns:
        The stage's record. Its folder contains hypotheses.jsonl, wer.json, report.html, report.md, the
        hypotheses and references in SLAM-LLM's format (decode_log_pred, decode_log_gt) and, if decode wrote
        them, n-best lists.

    Raises:
        InputError: parts are missing, or come from different models, manifests or options.
    """
    config = read_config(str(fetch_folder(model)))
    records = _complete_parts([require_record(part, "decode") for part in parts])
    files = [record.file(HYPOTHESES) for record in records]
    rows = [row for file in files for row in read_hypotheses(file)]
    inputs: dict[str, Any] = {
        # These are digests of the content, so that parts decoded again with the same texts need no new
        # report.
        "parts": [sha256_of_file(file) for file in files],
        "title": recipe.name,
        "training": config.training,
        "published": recipe.published_wer,
        "controls": {"shuffled": recipe.decoding.shuffled_control, "seed": recipe.decoding.seed},
    }

    if not separates_words(row.reference for row in rows):
        # Without this key, an older report, which counts words in any language, would be reused.
        inputs["unit"] = "characters"
    for name in (NBEST, AUDIO):
        # The key is left out if no part has such a file: the report then has the same fingerprint as in
        # versions without these files.
        if of_parts := _files_named(records, name):
            inputs[name] = [sha256_of_file(file) for file in of_parts]

    def work(folder: Path) -> Outcome:
        write_hypotheses(folder / HYPOTHESES, rows)
        if nbest := _files_named(records, NBEST):
            # splitlines() would also split at U+2028 and similar characters within a JSON string.
            lines = (line for file in nbest for line in file.read_bytes().split(b"\n") if line)
            # Each line begins with its key, so the order does not depend on the work shards.
            write_atomically(folder / NBEST, b"".join(line + b"\n" for line in sorted(lines)))
        return _report(folder, recipe, rows, config.training, records)

    return run_stage(STAGE, output, inputs, work, overwrite)


def _files_named(records: Sequence[Record], name: str) -> list[Path]:
    """Return the file of this name in each part that has one."""
    return [record.file(name) for record in records if exists(join(record.folder, name))]


def _report(
    folder: Path, recipe: Recipe, rows: Sequence[Hypothesis], training: dict[str, Any], parts: list[Record]
) -> Outcome:
    """Write the report of all utterances, with the controls that the recipe requests.

    The order of `rows` does not matter.
    """
    # The bootstrap intervals draw utterances by position, so the order must not depend on that of the parts.
    rows = sorted(rows, key=lambda row: (row.key, row.subset))
    controls = {EMPTY: empty_output(rows)}
    if recipe.decoding.shuffled_control and (shuffled := shuffled_audio(rows, recipe.decoding.seed)):
        controls = {SHUFFLED: shuffled, **controls}
    facts, audio = _joined(parts), read_audio(_files_named(parts, AUDIO))
    metrics = write_report(folder, recipe, rows, controls, training, facts, audio)
    write_for_slam_llm(folder, rows)
    # `publish` needs these digests, which the report does not show.
    facts["manifests"] = parts[0].inputs.get("manifests", [])
    name, rate = next(iter(metrics.items()))  # `wer`, or `cer` where spaces do not separate words
    return Outcome(f"{name.upper()} {rate:.2f} % on {len(rows)} utterances", metrics, facts)


def _joined(records: Sequence[Record]) -> dict[str, Any]:
    """Return the facts of all parts together: sums of times and counts, and the first part's other values."""
    facts = records[0].facts
    summed = [key for key in (*_TIMES, *_COUNTS) if key in facts]
    return facts | {key: round(sum(record.facts[key] for record in records), 4) for key in summed}


def _complete_parts(records: list[Record]) -> list[Record]:
    """Check that the parts make up one complete decoding, and sort them by number.

    Raises:
        InputError: no part is given, a part is missing or repeated, or parts are of different decodings.
    """
    if not records:
        raise InputError("There is nothing to score: --parts names no folder that `slam-asr decode` wrote.")
    by_number: dict[int, Record] = {}
    for record in records:
        number, total = _numbers(record)
        if number in by_number:
            raise InputError(
                f"{record.folder} and {by_number[number].folder} are both work shard {number}/{total}: "
                "give each part once."
            )
        by_number[number] = record
        other = records[0]
        changed = [name for name in different_inputs(record.inputs, other.inputs) if name != "part"]
        if changed or total != _numbers(other)[1]:
            raise InputError(
                f"{record.folder} and {other.folder} are parts of different decodings "
                f"(different: {', '.join(changed) or 'number of parts'}): decode all with the same inputs."
            )
    if missing := [f"{number}/{total}" for number in range(1, total + 1) if number not in by_number]:
        raise InputError(
            f"The decoding lacks {len(missing)} of {total} parts, first {missing[0]}: "
            f"run `slam-asr decode --work-shard {missing[0]}` with the same other options."
        )
    return [by_number[number] for number in sorted(by_number)]


def _numbers(record: Record) -> tuple[int, int]:
    """Return a record's work shard i/n as (i, n). Older records of a decoding in one part have none."""
    number, total = record.inputs.get("part", "1-of-1").split("-of-")
    return int(number), int(total)
