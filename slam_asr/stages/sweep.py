"""The steps of a sweep that come before any training: checking the variations, and writing their recipes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr.artifacts.stage_record import Outcome, Record, run_stage
from slam_asr.config.recipe import Recipe, dump_recipe
from slam_asr.config.variations import Variation, resolve, varied
from slam_asr.storage import write_atomically, write_json

PLAN, VARY = "plan-sweep", "vary-recipe"
VARIATIONS, RECIPE = "variations.json", "recipe.yaml"


def plan_sweep(recipe: Recipe, entries: Sequence[Any], output: str) -> tuple[Record, list[Variation]]:
    """Check all variations before the corpus is read.

    Args:
        recipe: the recipe to vary.
        entries: mappings of full keys to values, each optionally with a `name`.
        output: folder for variations.json; {fingerprint} in it is replaced by a digest of the inputs.

    Returns:
        The stage's record, and the variations with their names.

    Raises:
        UserError: a variation is not valid; see `resolve`.
    """
    variations = resolve(recipe, entries)
    values = [{"name": variation.name, **variation.overrides} for variation in variations]

    def work(folder: Path) -> Outcome:
        write_json(folder / VARIATIONS, values)
        return Outcome(f"{len(values)} variations of {recipe.name}", {"variations": len(values)})

    return run_stage(PLAN, output, {"recipe": asdict(recipe), "variations": values}, work), variations


def vary_recipe(recipe: Recipe, variation: Variation, output: str) -> Record:
    """Write the recipe of one variation.

    Args:
        recipe: the recipe to vary.
        variation: the changes.
        output: folder for recipe.yaml; {fingerprint} in it is replaced by a digest of the inputs.

    Returns:
        The stage's record.

    Raises:
        UserError: a key is unknown, or a value is not valid.
    """
    text = dump_recipe(varied(recipe, variation))

    def work(folder: Path) -> Outcome:
        write_atomically(folder / RECIPE, text)
        return Outcome(f"{variation.name}: {variation.describe()}", {"overrides": len(variation.overrides)})

    return run_stage(VARY, output, {"recipe": text, "variation": variation.as_json()}, work)
