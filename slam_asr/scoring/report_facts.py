"""Facts about a training run and a decoding as labels and text, for the report."""

from typing import Any

from slam_asr.pages.render import capital, with_thousands
from slam_asr.progress import clock

_TRAINING_LABELS = {
    "recipe": "Recipe",
    "encoder": "Speech encoder",
    "llm": "Language model",
    "trained_parameters": "Trained parameters",
    "all_parameters": "All parameters",
    "precision": "Precision",
    "device": "Device",
    "processes": "Processes",
    "steps": "Optimiser steps",
    "epochs": "Epochs",
    "train_utterances": "Training utterances",
    "train_hours": "Training audio",
    "seconds": "Training time",
}
_DECODING_LABELS = {
    "beams": "Beams",
    "utterances": "Utterances",
    "audio_hours": "Audio",
    "seconds": "Decoding time",
    "answers_cut": "Answers cut at the token limit",
    "empty_answers": "Empty answers",
    "close_calls": "Close calls, where rounding may decide",
}
"""Labels of facts, in the order in which they are shown. Facts that have no label here follow."""


def training_facts(training: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of a training run from its record, as labels and text; see `write_report`."""
    facts = {"trained_parameters": training.get("projector_parameters"), **training}
    facts.pop("projector_parameters", None)
    trained, total = facts["trained_parameters"], facts.get("all_parameters")
    if trained and total:
        facts["trained_parameters"] = f"{with_thousands(trained)} ({100 * trained / total:.2g}\u202f% of all)"
    return _facts(facts, _TRAINING_LABELS)


def decoding_facts(decoding: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts of a decoding from its record, as labels and text; see `write_report`."""
    facts = dict(decoding)
    hours, seconds = facts.pop("hours_decoded", decoding.get("audio_hours")), decoding.get("seconds")
    # A resumed decoding spent these seconds only on the hours that it decoded itself.
    if hours and seconds:
        facts["seconds"] = f"{clock(seconds)}, {hours * 3600 / seconds:.1f} times real time"
    return _facts(facts, _DECODING_LABELS)


def _facts(values: dict[str, Any], labels: dict[str, str]) -> list[tuple[str, str]]:
    """Return labels and values as text. Unknown values, lists and dictionaries are left out."""
    known = {key: v for key, v in values.items() if v is not None and not isinstance(v, list | dict)}
    return [
        (labels.get(key) or capital(key.replace("_", " ")), _shown(key, known[key]))
        for key in dict.fromkeys((*labels, *known))
        if key in known
    ]


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if key in ("audio_hours", "train_hours"):
        return f"{value:.2f} h"
    return clock(value) if key == "seconds" else with_thousands(value)
