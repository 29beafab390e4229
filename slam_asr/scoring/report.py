"""The report on a decoded test set: a page, a short table for the dashboard, and numbers for programs.

`report.html` is self-contained: style, script and curves are in the file. The page fetches and saves nothing,
and it works in a sandboxed frame. The model's error rate is shown next to its controls, the rates of output
that ignores the audio: a rate means little if such output is almost as good.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr import __version__
from slam_asr.artifacts.hypotheses import Hypothesis, align
from slam_asr.artifacts.word_errors import Measured, groups_of, measure, without_hypotheses
from slam_asr.config.recipe import Recipe
from slam_asr.errors import InputError
from slam_asr.pages.curves import draw_curves, with_thinned_curves
from slam_asr.pages.render import capital, render, with_thousands
from slam_asr.scoring.analysis import ANSWER_FAULTS, analyse, counts_of, faults_of
from slam_asr.scoring.controls import EMPTY
from slam_asr.scoring.report_audio import Name, worst_first
from slam_asr.scoring.report_facts import decoding_facts, training_facts
from slam_asr.storage import write_atomically, write_json

PAGE = "report.html"
MARKDOWN = "report.md"
NUMBERS_FILE = "wer.json"

MAX_UTTERANCES = 200
"""Maximum number of utterances shown with their alignments.

200 are enough to show typical errors and add about 200 KB to the page.
"""
MAX_SPEAKERS = 100
"""Maximum number of speakers whose rates are shown; wer.json contains those of all speakers."""
NO_SUBSET = "(no subset)"
_LONG_NAMES = {"words": "Word error rate", "characters": "Character error rate"}
"""Full name of the rate, keyed by the unit it counts."""

_CONTROL_NOTES = {
    "shuffled audio": (
        "Each utterance decoded with the audio of another. A model that listens does far better than this."
    ),
    "empty output": "No hypothesis contains a word.",
}


def write_report(
    folder: Path,
    recipe: Recipe,
    rows: Sequence[Hypothesis],
    controls: dict[str, list[Hypothesis]],
    training: dict[str, Any],
    decoding: dict[str, Any],
    audio: dict[Name, str] | None = None,
) -> dict[str, float]:
    """Write `report.html`, `report.md` and `wer.json`.

    Args:
        folder: output folder; created if missing.
        recipe: its name is the page's heading, and its published rates are shown next to the measured ones.
        rows: the model's hypotheses.
        controls: other hypotheses for the same utterances, keyed by `shuffled audio` and `empty output`.
        training: facts about the model's training: recipe, encoder, llm, trained_parameters (or, if that is
            absent, projector_parameters), all_parameters, precision, device, processes, steps, epochs,
            seconds, train_utterances and train_hours; and the curves, which are `curve`, `validation` and
            `beginning` of `slam_asr.pages.curves.write_curves`. Absent facts are not shown. Other numbers and
            texts are shown under their own names, other lists and dictionaries are not shown.
        decoding: facts about the decoding: beams, seconds, audio_hours, hours_decoded (for the speed, if it
            differs from audio_hours), utterances, answers_cut, empty_answers, close_calls; absent and other
            facts as in `training`.
        audio: MP3 in base64 of some of the worst utterances, to be played on the page.

    Returns:
        Metrics in percent, to two decimals: `wer` (all utterances; always the first key), `wer SUBSET`,
        `wer CONTROL`, `wer 95 % low`, `wer 95 % high`, `wer normalised` and `cer`. If characters are counted,
        `cer` replaces `wer` in every key.

    Raises:
        InputError: no utterance was decoded, or no reference contains a word.
    """
    if not rows:
        raise InputError(
            "There is nothing to report, because no utterance was decoded: check the test manifest."
        )
    measured = measure(rows)
    _ = measured.total().wer  # If the references contain no words, this raises before anything is written.
    # Curves of long training runs have thousands of points, which would make the page large.
    training = with_thinned_curves(training)
    numbers = {
        "title": recipe.name,
        "wer_unit": "percent",
        **analyse(measured),
        "controls": {
            name: _by_subset(
                without_hypotheses(measured) if name == EMPTY else measure(control, measured.characters)
            )
            for name, control in controls.items()
        },
        "published": recipe.published_wer,
        "training": training,
        "decoding": decoding,
        "version": __version__,
    }
    write_atomically(folder / PAGE, _page(numbers, measured, audio or {}))
    write_atomically(folder / MARKDOWN, _markdown(numbers))
    # JSON has no NaN and no infinities: they become null.
    write_json(folder / NUMBERS_FILE, json.loads(json.dumps(numbers), parse_constant=lambda name: None))
    return _metrics(numbers)


def _by_subset(measured: Measured) -> dict[str, Any]:
    subsets = groups_of(measured.rows, lambda row: row.subset)
    return {
        "all": counts_of(measured),
        "subsets": {name: counts_of(measured, indices) for name, indices in subsets.items()},
    }


def _metrics(numbers: dict[str, Any]) -> dict[str, float]:
    short = short_name(numbers).lower()
    named = {short: numbers["all"]}
    named |= {f"{short} {name}": counts for name, counts in numbers["subsets"].items() if name}
    named |= {f"{short} {name}": control["all"] for name, control in numbers["controls"].items()}
    metrics = {name: counts["rate"] for name, counts in named.items()}
    total = numbers["all"]
    metrics[f"{short} 95 % low"], metrics[f"{short} 95 % high"] = total["interval"] or (None, None)
    for name, value in ((f"{short} normalised", total["normalised"]), ("cer", total["cer"])):
        metrics[name] = metrics.get(name) if value is None else value
    # A subset whose references are empty has no rate.
    return {name: value for name, value in metrics.items() if value is not None}


def short_name(numbers: dict[str, Any]) -> str:
    """The short name of a report's rate: `WER`, or `CER` if characters are counted.

    Args:
        numbers: content of a `wer.json`. Older files have no `unit`; they always count words.
    """
    return "CER" if numbers.get("unit") == "characters" else "WER"


# ---- the page


def _page(numbers: dict[str, Any], measured: Measured, audio: dict[Name, str]) -> str:
    return render(
        PAGE,
        filters={"rate": rate_text, "interval": interval_text},
        long=_LONG_NAMES[numbers["unit"]],
        **numbers,
        rows=_table(numbers),
        short=short_name(numbers),
        control_notes=_CONTROL_NOTES,
        has_published=_has_published(numbers),
        training_facts=training_facts(numbers["training"]),
        decoding_facts=decoding_facts(numbers["decoding"]),
        curves=draw_curves(numbers["training"]),
        fault_notes=ANSWER_FAULTS,
        groups=_groups(numbers),
        utterances=_worst(measured, audio),
    )


def _has_published(numbers: dict[str, Any]) -> bool:
    return any(name in numbers["published"] for name in numbers["subsets"])


def _table(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per subset, and a row for the total if there are several subsets."""
    table = []
    for name, counts in numbers["subsets"].items():
        controls = [control["subsets"].get(name, {}).get("rate") for control in numbers["controls"].values()]
        table.append(
            {"label": name or NO_SUBSET, "published": numbers["published"].get(name), "controls": controls}
            | counts
        )
    if len(table) > 1:
        controls = [control["all"]["rate"] for control in numbers["controls"].values()]
        table.append({"label": "All", "published": None, "controls": controls} | numbers["all"])
    return table


def _worst(measured: Measured, audio: dict[Name, str]) -> list[dict[str, Any]]:
    """The utterances with the most errors (words or characters), worst first; they raise the rate most."""
    rows, errors, words = measured.rows, measured.errors.tolist(), measured.words.tolist()
    return [
        asdict(rows[i])
        | {
            "errors": errors[i],
            "words": words[i],
            "rate": round(100 * errors[i] / words[i], 2) if words[i] else None,
            "pieces": _pieces(rows[i], measured.characters),
            "faults": faults_of(rows[i], measured.characters),
            "audio": audio.get((rows[i].key, rows[i].subset), ""),
        }
        for i in worst_first(measured)[:MAX_UTTERANCES]
    ]


def _groups(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """A table of rates by audio length and one by speaker; each is omitted if it would have only one row."""
    durations = [
        (f"{group['from']} to {group['to']} s" if group["to"] else f"above {group['from']} s", group)
        for group in numbers["durations"]
    ]
    speakers = sorted(numbers["speakers"].items(), key=lambda item: (-(item[1]["rate"] or 0), item[0]))
    note = "Highest rates first."
    if len(speakers) > MAX_SPEAKERS:
        note = f"The {MAX_SPEAKERS} speakers with the highest rates, out of {with_thousands(len(speakers))}."
    tables = [
        ("By length of the audio", "Audio", durations, ""),
        ("By speaker", "Speaker", speakers[:MAX_SPEAKERS], note),
    ]
    return [_group_table(*table) for table in tables if len(table[2]) > 1]


def _group_table(
    heading: str, label: str, groups: list[tuple[str, dict[str, Any]]], note: str
) -> dict[str, Any]:
    # The rates are divided by this to get the lengths of the bars, so it is 1 if no group has errors.
    highest = max((group["rate"] or 0 for _, group in groups), default=0) or 1
    rows = [
        group | {"label": name, "bar": round(100 * (group["rate"] or 0) / highest, 1)}
        for name, group in groups
    ]
    return {"heading": heading, "label": label, "rows": rows, "note": note}


def _pieces(row: Hypothesis, characters: bool) -> list[tuple[str, str, str]]:
    """The alignment as pieces (kind, reference, hypothesis). Each substituted word is a piece of its own."""
    separator = "" if characters else " "
    pieces = []
    for kind, reference, hypothesis in align(row, characters):
        if kind == "substitute":
            pieces += [(kind, *words) for words in zip(reference, hypothesis, strict=True)]
        else:
            pieces.append((kind, separator.join(reference), separator.join(hypothesis)))
    return pieces


def rate_text(percent: float | None) -> str:
    """A rate in percent for a table cell, or a dash for None."""
    return "–" if percent is None else f"{percent:.2f}"


def interval_text(ends: Sequence[float] | None) -> str:
    """An interval for a table cell, such as `12.01–14.20`, or a dash for None."""
    return "–" if ends is None else f"{ends[0]:.2f}–{ends[1]:.2f}"


# ---- the other two files


def _markdown(numbers: dict[str, Any]) -> str:
    total = numbers["all"]
    unit, has_published = numbers["unit"], _has_published(numbers)
    counts = {"Sub.": "substitutions", "Del.": "deletions", "Ins.": "insertions"}
    counts |= {capital(unit): "words", "Utterances": "utterances"}
    table = [
        [
            ("Subset", escape_markdown(row["label"])),
            (f"{short_name(numbers)}, %", rate_text(row["rate"])),
            ("95 % interval", interval_text(row["interval"])),
            *([("Published, %", rate_text(row["published"]))] if has_published else []),
            *(
                (f"{escape_markdown(capital(name))}, %", rate_text(rate))
                for name, rate in zip(numbers["controls"], row["controls"], strict=True)
            ),
            ("Normalised, %", rate_text(row["normalised"])),
            *([("CER, %", rate_text(row["cer"]))] if unit == "words" else []),
            *((heading, with_thousands(row[key])) for heading, key in counts.items()),
            ("Hours", f"{row['hours']:.2f}" if row["hours"] else "–"),
        ]
        for row in _table(numbers)
    ]
    lines = [
        f"# {escape_markdown(numbers['title'])}",
        "",
        f"**{_LONG_NAMES[unit]} {rate_text(total['rate'])} %**: {with_thousands(total['errors'])} errors in "
        f"{with_thousands(total['words'])} {unit}, {with_thousands(total['utterances'])} utterances.",
        "",
        *markdown_table(table, texts=1),
    ]
    faults = numbers["faults"].items()
    wrong = [f"{escape_markdown(fault)}: {with_thousands(count)}" for fault, count in faults if count]
    if wrong:
        lines += ["", f"Answers that went wrong: {'; '.join(wrong)}."]
    for label, facts in (
        ("Trained", training_facts(numbers["training"])),
        ("Decoded", decoding_facts(numbers["decoding"])),
    ):
        if facts:
            shown = "; ".join(escape_markdown(f"{name} {value}") for name, value in facts)
            lines += ["", f"{label}: {shown}."]
    return "\n".join(lines) + "\n"


def markdown_table(rows: Sequence[Sequence[tuple[str, str]]], texts: int) -> list[str]:
    """Return the lines of a table in Markdown.

    Args:
        rows: heading and text of each cell; all rows have the same headings.
        texts: number of columns of text, which come first. All others have numbers, aligned on the right.
    """
    head = [heading for heading, _ in rows[0]]
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *([text for _, text in r] for r in rows))]


def escape_markdown(text: str) -> str:
    """Escape text so that no Markdown viewer treats it as markup."""
    # Line breaks become spaces, because one would end a table's row. `&` is replaced before the characters
    # whose replacements contain it.
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
