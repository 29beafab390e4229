"""Recipes: everything that decides what is trained and measured, typed and documented.

A recipe is a YAML file. Shipped recipes are in `slam_asr/recipes/` and are named by their file name without
`.yaml`; any other recipe is named by its path. The dataclasses of `sections`, `training`, `decoding` and
`publication` are the schema, and the docstring below each field is its help text. An unknown key, a wrong
value and a combination that cannot work are refused before any data or model is loaded, in a sentence that
names the key. The command line can override every key: `--training.max_steps 200`.
"""

import math
import operator
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from slam_asr.config.decoding import Decoding as Decoding
from slam_asr.config.deepspeed import adopt
from slam_asr.config.publication import Gate, Publish, valid_name
from slam_asr.config.schema import as_int, keys_of, nearest, parse_yaml, problems, typed
from slam_asr.config.sections import Columns as Columns
from slam_asr.config.sections import Data as Data
from slam_asr.config.sections import Encoder as Encoder
from slam_asr.config.sections import Features as Features
from slam_asr.config.sections import Llm as Llm
from slam_asr.config.sections import Lora as Lora
from slam_asr.config.sections import Projector as Projector
from slam_asr.config.training import Training as Training
from slam_asr.errors import ConfigurationError
from slam_asr.storage import is_s3, read_bytes

MODEL_KEYS = ("encoder.name", "llm.name", "llm.trust_remote_code")
"""Keys that describe the base models of a trained model, and that users may change after training: where the
base models are, and whether the LLM's own code may run."""
_DISTRIBUTION = ("nodes", "processes", "engine", "zero_stage", "offload_optimizer", "deepspeed")
_KERNELS = ("positions_per_batch", "packing", "gradient_checkpointing", "compile", "liger")
_CHECKPOINTS = ("checkpoint_every", "checkpoint_minutes", "checkpoints", "nonfinite_steps")
_LOGS = ("log_every", "samples", "trackers")
"""Keys of the section `training`, in these four groups, that change the trained weights by rounding errors at
most."""
FRAMES_PER_SECOND = 50
"""Frames per second of audio: every supported encoder gives one frame per 20 ms."""


@dataclass
class Recipe:
    """A model, how it is trained, and how it is measured."""

    name: str = "custom"
    """Name of the recipe, shown in the report and in the dashboard."""
    description: str = ""
    """What the recipe is for, in a sentence or two."""
    published_wer: dict[str, float] = field(default_factory=dict)
    """Published word error rate in percent per test subset, shown next to the measured one."""
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    features: Features = field(default_factory=Features)
    projector: Projector = field(default_factory=Projector)
    llm: Llm = field(default_factory=Llm)
    training: Training = field(default_factory=Training)
    decoding: Decoding = field(default_factory=Decoding)
    gate: Gate = field(default_factory=Gate)
    publish: Publish = field(default_factory=Publish)

    @property
    def caches_features(self) -> bool:
        """Whether encoder outputs are computed once and cached, rather than on the fly."""
        return self.encoder.tuning == "frozen" and self.features.cache == "store"

    @property
    def registered_name(self) -> str:
        """Name of the registered model to which a trained model is added as a version."""
        return self.publish.name or self.name

    def __post_init__(self) -> None:
        for problem in problems(self):
            raise ConfigurationError(f"Recipe {self.name}: {problem}")

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each contradiction that the sections cannot find themselves."""
        shortest, group = math.ceil(self.data.min_duration * FRAMES_PER_SECOND), self.projector.downsampling
        groups_frames = self.encoder.frames == "speech" and self.projector.kind != "q-former"
        if groups_frames and shortest < group:
            yield (
                f"data.min_duration ({self.data.min_duration} s, {shortest} frames) leaves the shortest "
                f"utterances without an audio position at projector.downsampling {group}: raise "
                f"data.min_duration to {group / FRAMES_PER_SECOND} or more."
            )
        if self.gate.active and self.publish.registry == "none":
            yield (
                "gate decides whether a model is published, but publish.registry is none: "
                "choose kubeflow or mlflow, or leave out gate."
            )
        if self.publish.registry != "none" and not valid_name(self.registered_name):
            yield f"{self.name!r} cannot be the name of a registered model: set publish.name."
        # load_recipe() has already moved DeepSpeed's settings, from a file or from its `overrides`, into the
        # recipe's own keys. Options on the command line do not go through load_recipe(), so settings that
        # adopt() would still move are refused here.
        remaining: dict[str, Any] = {"deepspeed": self.training.deepspeed}
        adopt({"training": remaining}, f"Recipe {self.name}")
        if remaining != {"deepspeed": self.training.deepspeed}:
            yield (
                "training.deepspeed also sets other keys of the recipe, which it "
                "cannot do on the command line: write it into the recipe's file."
            )


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a key by its full name, such as `training.max_steps`."""
    return operator.attrgetter(key)(recipe)


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with the package, keyed by name."""
    return {file.stem: file for file in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def load_recipe(source: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe by shipped name, file, or YAML text, with overrides applied.

    Args:
        source: `demo`, `path/to/recipe.yaml`, `s3://bucket/recipe.yaml`, or the YAML itself (any text with a
            line break or that begins with a brace).
        overrides: values by full key, such as `{"training.max_steps": 200}`.

    Raises:
        UserError: the recipe does not exist; a key is unknown, given twice or without a value; or a value has
            the wrong type, is out of bounds or contradicts another one.
    """
    values, where = _read(source)
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        target = values
        for depth, section in enumerate(sections, start=1):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigurationError(
                    f"{where}: {'.'.join(sections[:depth])} must contain keys of its own."
                )
        target[name] = as_int(value)
    adopt(values, where)
    return typed(values, Recipe, where)


def recipe_values(source: str) -> dict[str, Any]:
    """Return a recipe's values as nested dictionaries, after all checks: the defaults of a command line."""
    return asdict(load_recipe(source))


def with_base_models_of(trained: Recipe, given: Recipe | None) -> Recipe:
    """Return a training run's recipe with the user's values of `MODEL_KEYS`.

    Args:
        trained: the recipe that a model or a checkpoint contains.
        given: the user's recipe. If None, the base models are looked for where they were in training, and the
            LLM's own code may not run: only the user may allow that, not a recipe that comes with a model.
    """
    named = given or trained
    allowed = given is not None and given.llm.trust_remote_code
    llm = replace(trained.llm, name=named.llm.name, trust_remote_code=allowed)
    return replace(trained, encoder=replace(trained.encoder, name=named.encoder.name), llm=llm)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: every key, in the order of the dataclasses."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True, width=100)


def settings_that_affect_weights(recipe: Recipe) -> dict[str, Any]:
    """Return those of the recipe's settings that change the trained weights by more than rounding errors.

    The engine, for example, is left out: all engines give the same weights up to rounding.
    """
    values = asdict(recipe)
    for key in (*_DISTRIBUTION, *_KERNELS, *_CHECKPOINTS, *_LOGS):
        del values["training"][key]
    assert isinstance(recipe.training.deepspeed, dict), "load_recipe has read the file, if it was a path"
    if optimizer := recipe.training.deepspeed.get("optimizer"):
        values["training"]["deepspeed"] = {"optimizer": optimizer}
    # These keys did not exist in earlier versions. They are left out where they have no effect, so that the
    # inputs of a training run from an earlier version still match.
    for section, key in (
        ("llm", "trust_remote_code"),
        ("llm", "answer_prefix"),
        ("projector", "dropout"),
        ("projector", "ctc_weight"),
        ("projector", "drop_blanks"),
    ):
        if not values[section][key]:
            del values[section][key]
    if not recipe.projector.beginning.active:
        del values["projector"]["beginning"]
    if not recipe.projector.masks.active:
        del values["projector"]["masks"]
    del values["encoder"]["batch_seconds"]
    del values["projector"]["init_from"]  # the digest of its weights is an input of its own
    # Only three settings of the features matter: the dtype, to which features are rounded, and the two that
    # determine the order of the utterances.
    features = values["features"]
    values["features"] = {key: features[key] for key in ("dtype", "shard_megabytes", "window_shards")}
    return {section: values[section] for section in ("encoder", "features", "projector", "llm", "training")}


def recipe_keys() -> list[str]:
    """Return the full names of all sections and keys: `name`, `training`, `training.max_steps`, …"""
    return keys_of(Recipe)


def _read(source: str) -> tuple[dict[str, Any], str]:
    shipped = shipped_recipes()
    where = f"Recipe {source}"
    text: str | bytes
    if "\n" in source or source.startswith("{"):
        text, where = source, "The recipe given as text"
    elif source in shipped:
        text = shipped[source].read_bytes()
    elif is_s3(source) or os.path.isfile(source):
        text = read_bytes(source)
    else:
        hint = nearest(source, list(shipped)) or "."
        raise ConfigurationError(
            f"No recipe named {source}, and no such file{hint} Shipped recipes: {', '.join(shipped)}."
        )
    values = parse_yaml(text, where, "encoder:")
    # `features: none` and `features: null` both mean no cache. The default is `...`, so that a missing key is
    # not taken for null.
    if values.get("features", ...) in (None, "none"):
        values["features"] = {"cache": "none"}
    return values, where
