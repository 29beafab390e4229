"""The variations of a sweep: what each changes of the recipe, checked all together before anything runs.

They are written as a list, where each entry names its changes by full key:

    - {training.learning_rate: 1e-4}
    - {name: two layers, projector.hidden: 4096}

or as a grid, of which every combination is tried:

    training.learning_rate: [1e-4, 3e-4]
    projector.downsampling: [5, 10]
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from slam_asr.errors import UserError
from slam_asr.recipe import Recipe, as_int, load_recipe, recipe_keys
from slam_asr.storage import is_s3, read_bytes

SHARED = ("name", "data", "encoder", "features", "training.nodes")
"""What no variation may change: they share one manifest and one feature store, and the pipeline is compiled for one number of machines."""
LEAST = 2
MOST = 100
"""Variations of one sweep; more is most often a grid that grew by mistake."""

_EXAMPLE = "write a list such as `- {training.learning_rate: 1e-4}`, or a grid such as `training.learning_rate: [1e-4, 3e-4]`"
_NAME = re.compile(r"[^\x00-\x1f/]{1,80}")


@dataclass
class Variation:
    """One training of a sweep."""

    name: str
    overrides: dict[str, Any]
    """Values by full key, such as {"training.learning_rate": 0.0001}; in the order of the keys, as a pipeline's parameter keeps none."""

    def __post_init__(self) -> None:
        # Nor does it keep whole numbers.
        self.overrides = {key: as_int(value) for key, value in sorted(self.overrides.items())}

    def as_json(self) -> str:
        """As the pipeline's steps hand it on; `variation_of` reads it."""
        return json.dumps({"name": self.name, **self.overrides}, ensure_ascii=False)

    def told(self) -> str:
        """`training.learning_rate 0.0001, projector.layers 2`."""
        return (
            ", ".join(f"{key} {_shown(value)}" for key, value in self.overrides.items())
            or "the recipe as it is"
        )


def read_variations(path: str) -> list[dict[str, Any]]:
    """The variations that a file names, with a grid's combinations spelt out; `resolve` checks them.

    Args:
        path: YAML, on disk or in object storage.

    Raises:
        UserError: no such file, or neither a list nor a grid.
    """
    try:
        text = read_bytes(path) if is_s3(path) else Path(path).read_bytes()
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"The variations {path} cannot be read ({error.strerror}): check --sweep.") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"The variations {path} are no YAML ({' '.join(str(error).split())}): {_EXAMPLE}."
        ) from None
    if isinstance(values, dict) and values:
        return _grid(values, path)
    if isinstance(values, list) and all(isinstance(entry, dict) for entry in values):
        return values
    raise UserError(f"The variations {path} are neither a list of mappings nor a grid: {_EXAMPLE}.")


def _grid(values: dict[str, Any], path: str) -> list[dict[str, Any]]:
    lonely = [key for key, choices in values.items() if not isinstance(choices, list) or not choices]
    if lonely:
        raise UserError(f"The variations {path} give {lonely[0]} no list of values: {_EXAMPLE}.")
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


def resolve(recipe: Recipe, entries: Sequence[Any]) -> list[Variation]:
    """Name each variation, and check that the recipe can be varied so.

    Args:
        recipe: what is varied.
        entries: mappings of full keys to values, each perhaps with a `name`.

    Raises:
        UserError: fewer than two, a key that all share, an unknown key, a value that cannot be, or two of one name or one meaning.
    """
    if not LEAST <= len(entries) <= MOST:
        raise UserError(f"A sweep has {LEAST} to {MOST} variations, not {len(entries)}: {_EXAMPLE}.")
    found: list[Variation] = []
    seen: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"Variation {number} of the sweep"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {json.dumps(entry)}, not a mapping: {_EXAMPLE}.")
        overrides = {str(key): as_int(value) for key, value in entry.items() if key != "name"}
        for key in overrides:
            _require_own(key, where)
        name = str(entry.get("name") or _named(overrides))
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where} is named {name!r}: a name has 1 to 80 characters, without line breaks and slashes; give it one with `name: …`."
            )
        if name in (variation.name for variation in found):
            raise UserError(f"Two variations of the sweep are named {name}: give each a name of its own.")
        variation = Variation(name, overrides)
        try:
            meaning = json.dumps(asdict(replace(varied(recipe, variation), name="")), sort_keys=True)
        except UserError as error:
            raise UserError(f"{where} ({name}): {error}") from None
        if meaning in seen:
            raise UserError(
                f"The variations {seen[meaning]} and {name} come to the same recipe: leave one out."
            )
        seen[meaning] = name
        found.append(variation)
    return found


def variation_of(text: str) -> Variation:
    """A variation as the pipeline's steps hand it on: JSON of its name and its overrides.

    Raises:
        UserError: it is none.
    """
    try:
        values = json.loads(text)
        name = values.pop("name")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f'{text} is no variation of a sweep: it is JSON of a name and overrides, such as {{"name": "slow", "training.learning_rate": 0.0001}}.'
        ) from None
    return Variation(name, values)


def varied(recipe: Recipe, variation: Variation) -> Recipe:
    """The recipe of one variation, which bears its name.

    Raises:
        UserError: an unknown key or a value that cannot be.
    """
    return load_recipe(json.dumps(asdict(recipe)), variation.overrides | {"name": variation.name})


def require_trainings_of_their_own(recipe: Recipe, variations: Sequence[Variation]) -> None:
    """Refuse two variations that train the same, where they run at the same time: both would write the same checkpoints.

    Raises:
        UserError: naming the two.
    """
    seen: dict[str, str] = {}
    for variation in variations:
        sections = asdict(varied(recipe, variation))
        training = json.dumps(
            {
                key: value
                for key, value in sections.items()
                if key not in ("name", "decoding", "published_wer")
            },
            sort_keys=True,
        )
        if training in seen:
            raise UserError(
                f"The variations {seen[training]} and {variation.name} differ in decoding alone, so both would train the same model at the same time: add --parallel 1, "
                "and the second takes the first one's; or train it once and measure it with --model."
            )
        seen[training] = variation.name


def _require_own(key: str, where: str) -> None:
    for shared in SHARED:
        if key == shared or key.startswith(f"{shared}."):
            raise UserError(
                f"{where} changes {key}, but all variations share {', '.join(SHARED[1:-1])} and {SHARED[-1]}: change it for the whole sweep with --{key}, "
                "or run the recipe by itself."
            )
    if key not in recipe_keys():
        from slam_asr.configuration import nearest

        raise UserError(f"{where} changes {key}, which no recipe has{nearest(key, recipe_keys()) or '.'}")


def _named(overrides: dict[str, Any]) -> str:
    """`learning_rate=0.0001 downsampling=10`; whole keys where the last parts alone are not enough."""
    last = [key.rpartition(".")[2] for key in overrides]
    keys = last if len(set(last)) == len(last) else list(overrides)
    return (
        " ".join(f"{key}={_shown(value)}" for key, value in zip(keys, overrides.values(), strict=True))
        or "as it is"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
