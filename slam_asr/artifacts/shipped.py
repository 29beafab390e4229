"""The default model, which is the best of the shipped models, and the facts in its model card.

A model card is the README.md of a model folder. Its front matter has the form of the model hub's cards, with
the measured word error rate in `model-index`. An additional key, `limits`, describes the model's limits.
"""

from pathlib import Path
from typing import Any

import yaml

from slam_asr.artifacts.model_folder import CONFIG, shipped_models
from slam_asr.errors import ModelError
from slam_asr.storage import exists, join

CARD = "README.md"
"""Name of the model card's file in a model folder."""


def default_model() -> str:
    """Return the name of the shipped model with the lowest word error rate in its card.

    Raises:
        ModelError: a card is missing or not valid, or has no word error rate.
    """
    models = shipped_models()
    return min(models, key=lambda name: (_result(models[name])["value"], name))


def describe_default() -> str:
    """Return a sentence with the default model's name, its word error rate and its limits, from its card.

    Raises:
        ModelError: the card lacks one of them.
    """
    name = default_model()
    folder = shipped_models()[name]
    result = _result(folder)
    return (
        f"The default model, {name}, has a word error rate of {result['value']:g} % on {result['dataset']}; "
        f"{_front_matter(folder)['limits']}."
    )


def language_of(folder: Path) -> str:
    """Return the language in a model's card, as ISO 639-1.

    The result is empty if the card is missing or not valid, or names no language or several.
    """
    try:
        language = _front_matter(folder).get("language", "")
    except ModelError:
        return ""
    return language if isinstance(language, str) else ""


def is_model(place: str) -> bool:
    """Return whether a path, a prefix or a name denotes a model rather than an audio file.

    The name of a shipped model does, and so does a folder or an s3:// prefix with a `config.json`.

    Raises:
        StorageError: the bucket cannot be read.
    """
    return place in shipped_models() or exists(join(place, CONFIG))


def _result(folder: Path) -> dict[str, Any]:
    """Return a card's word error rate in percent (`value`), and the name of its test set (`dataset`)."""
    for model in _front_matter(folder)["model-index"]:
        for result in model["results"]:
            for metric in result["metrics"]:
                if metric["type"] == "wer":
                    return {"value": float(metric["value"]), "dataset": result["dataset"]["name"]}
    raise ModelError(f"{folder / CARD} has no word error rate in its model-index: add it.")


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        _, text, _ = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
        values: dict[str, Any] = yaml.safe_load(text)
        if {"model-index", "limits"} <= values.keys():
            return values
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ModelError(f"{folder / CARD} has no YAML front matter: add it.") from error
    raise ModelError(f"{folder / CARD} needs model-index and limits in its front matter: add them.")
