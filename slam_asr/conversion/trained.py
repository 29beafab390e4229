"""Adopts a model that is already trained, for a pipeline that only evaluates it.

The model is first compared with the recipe. The recipe determines how features are extracted, and a model
that was trained on other features would otherwise be refused only after hours of extraction. Between the
pipeline's steps only a pointer to a finished stage's folder is passed. So a shipped or downloaded model,
which has no stage's record, is copied into the store, and the copy gets a record.
"""

import shutil
from pathlib import Path

from slam_asr.artifacts.model_folder import (
    ModelConfig,
    fetch_model,
    model_digests,
    read_config,
    shipped_models,
)
from slam_asr.artifacts.stage_record import Outcome, Record, read_record, run_stage
from slam_asr.config.recipe import Recipe, value_of
from slam_asr.errors import ConfigurationError

STAGE = "open-model"
FEATURE_KEYS = ("encoder.name", "encoder.frames", "encoder.long_audio", "encoder.tuning", "features.dtype")
"""Keys that determine the features: the recipe and the model must agree on them."""


def adopt_trained_model(recipe: Recipe, model: str, output: str) -> Record:
    """Check that a model fits the recipe that evaluates it, and return a record of the model.

    Args:
        recipe: names the test subsets, the encoder of the features, and the options of decoding.
        model: folder or s3:// prefix of a model, or the name of a shipped one.
        output: folder for a copy of a model that has no record; {fingerprint} in it becomes a digest.

    Returns:
        The record of convert-checkpoint, or of the copy.

    Raises:
        ModelError: the folder holds no model.
        ConfigurationError: the model was trained on other features, or the recipe names train or dev subsets.
    """
    require_test_only(recipe)
    require_same_features(recipe, model, read_config(model))
    # The name of a shipped model is not a path, so no record may be looked for under it.
    if model not in shipped_models() and (done := read_record(model)) is not None:
        return done
    folder = fetch_model(model)

    def work(place: Path) -> Outcome:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        return Outcome(f"a copy of {model}", {"files": sum(f.is_file() for f in folder.rglob("*"))})

    return run_stage(STAGE, output, {"model": model_digests(folder)}, work)


def require_test_only(recipe: Recipe) -> None:
    """Refuse a recipe that names train or dev subsets: they would be read and encoded for nothing.

    Raises:
        ConfigurationError: `data.train` or `data.dev` is not empty.
    """
    if recipe.data.train or recipe.data.dev:
        raise ConfigurationError(
            f"Recipe {recipe.name}: data.train and data.dev name subsets, but this run only evaluates a "
            'model: set both to [], in recipe_overrides {"data.train": [], "data.dev": []}.'
        )


def require_same_features(recipe: Recipe, model: str, config: ModelConfig) -> None:
    """Require that the model was trained on the features that the recipe extracts.

    Encoders are compared by name here, without the folder. The weights are compared when the encoder is
    loaded.

    Raises:
        ConfigurationError: the features differ; the message names the keys that differ and the options that
            correct them.
    """
    trained = config.typed_recipe
    differing = [key for key in FEATURE_KEYS if _comparable(recipe, key) != _comparable(trained, key)]
    if differing:
        differences = ", ".join(
            f"{key} is {value_of(recipe, key)}, not {value_of(trained, key)}" for key in differing
        )
        options = " ".join(f"--{key} {value_of(trained, key)}" for key in differing)
        raise ConfigurationError(
            f"Recipe {recipe.name} does not fit {model}, which was trained on other features "
            f"({differences}): add {options}."
        )


def _comparable(recipe: Recipe, key: str) -> str:
    value = value_of(recipe, key)
    # `openai/whisper-tiny.en`, `/models/whisper-tiny.en` and `s3://models/whisper-tiny.en/` are one encoder.
    return value.rstrip("/").rpartition("/")[2] if key == "encoder.name" else value
