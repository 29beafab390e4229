"""The variations of a sweep: sets of changes to a recipe, all of which are checked before anything runs.

They are written as a list, in which each entry gives the changes of one variation by full key:

    - {training.learning_rate: 1e-4}
    - {name: wide, projector.hidden: 4096}

or as a grid, whose combinations are all tried:

    training.learning_rate: [1e-4, 3e-4]
    projector.downsampling: [5, 10]
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from slam_asr.config.recipe import Recipe, load_recipe, recipe_keys, settings_that_affect_weights
from slam_asr.config.schema import as_int, is_within, nearest, read_yaml
from slam_asr.errors import ConfigurationError, StorageError, UserError
from slam_asr.storage import read_bytes

SHARED = ("name", "data", "encoder", "features", "training.nodes")
"""Keys that no variation may change.

All variations share one manifest and one feature store, and the pipeline is compiled for one number of nodes.
"""
MIN_VARIATIONS = 2
MAX_VARIATIONS = 100
"""Maximum number of variations in one sweep; more usually means a grid that became too large by mistake."""

_EXAMPLE = (
    "write a list such as `- {training.learning_rate: 1e-4}`, "
    "or a grid such as `training.learning_rate: [1e-4, 3e-4]`"
)
_NAME = re.compile(r"[^\x00-\x1f/]{1,80}")


@dataclass
class Variation:
    """One member of a sweep: a set of changes to the recipe, with a name."""

    name: str
    overrides: dict[str, Any]
    """Values by full key, such as {"training.learning_rate": 0.0001}, sorted by key."""

    def __post_init__(self) -> None:
        # As a pipeline's parameter, a mapping loses the order of its keys, and its integers become floats.
        self.overrides = {key: as_int(value) for key, value in sorted(self.overrides.items())}

    def as_json(self) -> str:
        """Return the variation as JSON, which the pipeline's steps pass on and `variation_of` reads."""
        return json.dumps({"name": self.name, **self.overrides}, ensure_ascii=False)

    def describe(self) -> str:
        """Return the changes in words: `projector.layers 2, training.learning_rate 0.0001`."""
        changes = ", ".join(f"{key} {_shown(value)}" for key, value in self.overrides.items())
        return changes or "the recipe unchanged"


def read_variations(path: str) -> list[dict[str, Any]]:
    """Read the variations from a file: a list, or all combinations of a grid. `resolve` checks them.

    Args:
        path: YAML, on disk or in object storage.

    Returns:
        Mappings of full keys to values, each optionally with a `name`.

    Raises:
        UserError: the file cannot be read, or contains neither a list nor a grid.
    """
    try:
        values = read_yaml(read_bytes(path), f"The variations {path}")
    except OSError as error:
        raise StorageError(
            f"The variations {path} cannot be read ({error.strerror}): check --sweep."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"The variations {path} are not valid YAML ({' '.join(str(error).split())}): {_EXAMPLE}."
        ) from None
    if isinstance(values, dict) and values:
        return _grid(values, path)
    if isinstance(values, list) and all(isinstance(entry, dict) for entry in values):
        return values
    raise ConfigurationError(f"The variations {path} are neither a list of mappings nor a grid: {_EXAMPLE}.")


def _grid(values: dict[str, Any], path: str) -> list[dict[str, Any]]:
    if not_lists := [key for key, choices in values.items() if not isinstance(choices, list) or not choices]:
        raise ConfigurationError(f"The variations {path} give {not_lists[0]} no list of values: {_EXAMPLE}.")
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


def resolve(recipe: Recipe, entries: Sequence[Any]) -> list[Variation]:
    """Name each variation, and check that it can be applied to the recipe.

    Args:
        recipe: the recipe to vary.
        entries: mappings of full keys to values, each optionally with a `name`.

    Raises:
        UserError: too few or too many variations, an entry that is not a mapping, a key that all variations
            share, an unknown key, a value or a name that is not valid, or two variations with the same name
            or the same recipe.
    """
    if not MIN_VARIATIONS <= len(entries) <= MAX_VARIATIONS:
        raise ConfigurationError(
            f"A sweep has {MIN_VARIATIONS} to {MAX_VARIATIONS} variations, not {len(entries)}: {_EXAMPLE}."
        )
    variations: list[Variation] = []
    seen: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"Variation {number} of the sweep"
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where} is {json.dumps(entry)}, not a mapping: {_EXAMPLE}.")
        overrides = {str(key): value for key, value in entry.items() if key != "name"}
        for key in overrides:
            _check_key(key, where)
        name = str(entry.get("name") or _default_name(overrides))
        variation = Variation(name, overrides)
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{where} is named {name!r}: a name has 1 to 80 characters, without slashes, line breaks and "
                "other control characters; give it one with `name: …`."
            )
        if name in seen.values():
            raise ConfigurationError(
                f"Two variations of the sweep are named {name}: give each a name of its own."
            )
        try:
            # Variations with different names may still be the same recipe.
            resolved = json.dumps(asdict(varied(recipe, variation)) | {"name": ""}, sort_keys=True)
        except UserError as error:
            raise ConfigurationError(f"{where} ({name}): {error}") from None
        if resolved in seen:
            raise ConfigurationError(
                f"The variations {seen[resolved]} and {name} result in the same recipe: leave one out."
            )
        seen[resolved] = name
        variations.append(variation)
    return variations


def variation_of(text: str) -> Variation:
    """Parse a variation from the JSON of `Variation.as_json`.

    Raises:
        ConfigurationError: the text is not a variation.
    """
    try:
        values = json.loads(text)
        name = values.pop("name")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigurationError(
            f"{text} is not a variation of a sweep: write JSON of a name and overrides, "
            'such as {"name": "slow", "training.learning_rate": 0.0001}.'
        ) from None
    return Variation(name, values)


def varied(recipe: Recipe, variation: Variation) -> Recipe:
    """Return the recipe of one variation, named after the variation.

    Raises:
        UserError: an unknown key or a value that is not valid.
    """
    return load_recipe(json.dumps(asdict(recipe)), variation.overrides | {"name": variation.name})


def require_distinct_trainings(recipe: Recipe, variations: Sequence[Variation]) -> None:
    """Refuse variations with the same training: in parallel, they would write the same checkpoints.

    Trainings are the same if they give the same weights, even if their engines, for example, differ.

    Raises:
        ConfigurationError: two variations have the same training. The message names both.
    """
    seen: dict[str, str] = {}
    for variation in variations:
        changed = varied(recipe, variation)
        settings = (settings_that_affect_weights(changed), changed.projector.init_from)
        training = json.dumps(settings, sort_keys=True)
        if training in seen:
            raise ConfigurationError(
                f"The variations {seen[training]} and {variation.name} differ in nothing that changes the "
                "trained weights, so both would train the same model at the same time: add --parallel 1, so "
                "that the second uses the first one's model, or train once and measure the model with "
                "--model."
            )
        seen[training] = variation.name


def _check_key(key: str, where: str) -> None:
    if is_within(key, SHARED):
        raise ConfigurationError(
            f"{where} changes {key}, but all variations share {', '.join(SHARED[1:-1])} and {SHARED[-1]}: "
            f"change it for all of them with --{key}, or run the recipe by itself."
        )
    if key not in recipe_keys():
        raise ConfigurationError(
            f"{where} changes {key}, which is not a key of a recipe{nearest(key, recipe_keys()) or '.'}"
        )


def _default_name(overrides: dict[str, Any]) -> str:
    """Name a variation after its values: `learning_rate=0.0001 downsampling=10`.

    The keys are given in full if their last parts are not unique.
    """
    short = {key.rpartition(".")[2]: value for key, value in overrides.items()}
    named = short if len(short) == len(overrides) else overrides
    return " ".join(f"{key}={_shown(as_int(value))}" for key, value in named.items()) or "unchanged"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
