"""A model that was trained elsewhere or before, taken into a pipeline that only measures it.

It is compared with the recipe first: features are extracted by the recipe, and a model that heard others would be
refused only after hours of that. What travels between the pipeline's steps is a pointer to a finished stage's folder; so a model
that has no such record (a shipped or a downloaded one) is copied into the store.
"""

import shutil
from pathlib import Path

from slam_asr.conversion.model import ModelConfig, model_digests, read_config
from slam_asr.conversion.shipped import fetch_model, shipped_models
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe, value_of
from slam_asr.stage import Outcome, Record, read_record, run_stage

STAGE = "open-model"
SAME = ("encoder.name", "encoder.frames", "encoder.long_audio", "encoder.tuning", "features.dtype")
"""What decides the features: the recipe that extracts them and the model that hears them must agree on it."""


def adopt_trained_model(recipe: Recipe, model: str, output: str) -> Record:
    """Compare a model with the recipe that is to measure it, and give it a record.

    Args:
        recipe: names test subsets, the encoder of the features, and how to decode.
        model: folder or s3:// prefix of a model, or the name of a shipped one.
        output: folder for a copy of a model that convert-checkpoint left no record of; {fingerprint} in it becomes a digest.

    Returns:
        The record of convert-checkpoint, or of the copy.

    Raises:
        UserError: no model there, one that was trained on other features, or a recipe that asks for more than test subsets.
    """
    require_test_only(recipe)
    require_same_features(recipe, model, read_config(model))
    if model not in shipped_models() and (done := read_record(model)) is not None:
        return done
    folder = fetch_model(model)

    def work(place: Path) -> Outcome:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        return Outcome(f"a copy of {model}", {"files": sum(f.is_file() for f in folder.rglob("*"))})

    return run_stage(STAGE, output, {"model": model_digests(folder)}, work)


def require_test_only(recipe: Recipe) -> None:
    """Refuse a recipe that names utterances to train on: they would be read and encoded for nothing.

    Raises:
        UserError: saying how to leave them out.
    """
    if recipe.data.train or recipe.data.dev:
        raise UserError(
            f"Recipe {recipe.name}: data.train and data.dev name subsets, but a model is only measured here: set both to [], "
            'in recipe_overrides {"data.train": [], "data.dev": []}.'
        )


def require_same_features(recipe: Recipe, model: str, config: ModelConfig) -> None:
    """Compare what decides the features. An encoder's weights are compared when it is opened; here its name, without its folder.

    Raises:
        UserError: naming what differs, and the options that mend it.
    """
    trained = config.typed_recipe
    differing = [key for key in SAME if _comparable(recipe, key) != _comparable(trained, key)]
    if differing:
        told = ", ".join(
            f"{key} is {value_of(recipe, key)}, not {value_of(trained, key)}" for key in differing
        )
        options = " ".join(f"--{key} {value_of(trained, key)}" for key in differing)
        raise UserError(
            f"Recipe {recipe.name} does not fit {model}, which was trained on other features ({told}): add {options}."
        )


def _comparable(recipe: Recipe, key: str) -> str:
    value = value_of(recipe, key)
    return value.rstrip("/").rpartition("/")[2] if key == "encoder.name" else value
