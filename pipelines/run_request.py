"""The pipeline that a command line requests: for training, evaluation (`--model`) or a sweep (`--sweep`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jsonargparse import ArgumentParser

from slam_asr.artifacts.model_folder import read_config, shipped_models
from slam_asr.cli import add_recipe_options, pop_recipe
from slam_asr.config.recipe import Recipe, shipped_recipes
from slam_asr.config.variations import Variation, read_variations, require_distinct_trainings, resolve, varied
from slam_asr.errors import ConfigurationError
from slam_asr.options import add_options, parse_options, refuse_empty
from slam_asr.steps import EVALUATION, PUBLISHING, SWEEP, TRAINING, outputs_of
from slam_asr.storage import is_s3, local_path


@dataclass
class RunRequest:
    """A pipeline, and the recipe, model or variations that it runs with."""

    recipe: Recipe | None = None
    """None if the pipeline is compiled without a recipe; the recipe is then given at submission."""
    model: str | None = None
    """Trained model to evaluate; None to train."""
    variations: list[Variation] = field(default_factory=list)
    """Variations of a sweep; empty for a single training."""
    parallel: int = 0
    """Number of variations that run at the same time in a cluster; 0 for all."""

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe. Only a request to compile a pipeline may have none."""
        assert self.recipe is not None, "only `compile` works without a recipe"
        return self.recipe

    @property
    def pipeline(self) -> str:
        """Name of the pipeline in Kubeflow."""
        if self.variations:
            return SWEEP
        if self.model is not None:
            return EVALUATION
        return PUBLISHING if self.recipe and self.recipe.publish.registry != "none" else TRAINING

    @property
    def results(self) -> dict[str, str]:
        """Steps of the pipeline, each with the output that points to its result folder."""
        return outputs_of(self.pipeline)

    @property
    def nodes(self) -> int:
        """Number of machines of each training run; 1 if nothing is trained."""
        return self.recipe.training.nodes if self.recipe and self.model is None else 1

    @property
    def parameters(self) -> dict[str, Any]:
        """Pipeline parameters other than `corpus`, `store`, `recipe` and `recipe_overrides`."""
        if self.variations:
            return {"variations": [{"name": v.name, **v.overrides} for v in self.variations]}
        return {"model": self.model} if self.model else {}

    @property
    def variants(self) -> list[Recipe]:
        """The recipe, and the recipe of each variation."""
        recipe = self.resolved_recipe
        return [recipe, *(varied(recipe, variation) for variation in self.variations)]

    def base_models(self) -> tuple[list[str], list[str]]:
        """Return the names of all encoders and of all LLMs that the run needs.

        The LLMs are those of the recipe and its variations, or the one that the model was trained with.
        """
        encoders = [self.resolved_recipe.encoder.name]
        if self.model:
            return encoders, [read_config(self.model).typed_recipe.llm.name]
        # A variation may name another LLM but not another encoder: the features are shared.
        return encoders, list(dict.fromkeys(variant.llm.name for variant in self.variants))


@dataclass
class Settings:
    """Options of `run` for containers."""

    network: str = "host"
    """docker: host, none, or the name of one of the engine's networks.

    On host, containers reach this machine's services at localhost.
    """
    gpus: str = "auto"
    """docker: all, none, or a number; auto uses all GPUs if the engine supports NVIDIA's."""
    shared_memory: str = "8g"
    """docker: size of /dev/shm."""
    mounts: list[str] | None = None
    """docker: additional folders to mount read-only at the same path, such as the folders of audio files that
    a corpus list names."""


@dataclass
class SweepOptions:
    """Options that select a sweep."""

    sweep: str | None = None
    """train every variation listed in this YAML file (a list of changes, or a grid) with the same features,
    and compare them"""


@dataclass
class ParallelOptions:
    """Options of a sweep in a cluster."""

    parallel: int = 0
    """sweep: number of variations that run at the same time (default: all)"""


def add_pipeline_options(parser: ArgumentParser, in_a_cluster: bool) -> None:
    """Add to a parser the options that select the pipeline."""
    places = "an s3:// prefix" if in_a_cluster else "a folder, an s3:// prefix"
    parser.add_argument(
        "--model",
        type=str,
        help=f"evaluate this model instead of training one: {places}, or the name of a shipped model",
    )
    add_options(parser, SweepOptions)
    if in_a_cluster:
        add_options(parser, ParallelOptions)


def parse_with_recipe(
    parser: ArgumentParser, arguments: Sequence[str], required: bool
) -> tuple[dict[str, Any], Recipe | None]:
    """Parse `[RECIPE] --option …`.

    Args:
        parser: parser of the command. The keys of the recipe become options too, with its values as defaults.
        arguments: all arguments after the command's name.
        required: whether the command needs a recipe.

    Returns:
        The values of all other options, with the name or file of the recipe as `source`, and the recipe.

    Raises:
        UserError: the recipe is missing or not valid, or an option is wrong.
    """
    source = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if source or required:
        add_recipe_options(parser, source)
    options = parse_options(parser, arguments[1:] if source else arguments)
    if required and not source:
        raise ConfigurationError(
            f"RECIPE is missing: {parser.prog} RECIPE, with a file or one of {', '.join(shipped_recipes())}."
        )
    recipe = pop_recipe(options) if source else None
    return options | {"source": source}, recipe


def request_from_options(options: dict[str, Any], recipe: Recipe | None, in_a_cluster: bool) -> RunRequest:
    """Build the request from parsed options.

    A model on this machine is checked against the recipe at once. A model in object storage is checked by the
    pipeline's first step.

    Args:
        options: parsed options, including those of `add_pipeline_options`.
        recipe: the resolved recipe, if one was named.
        in_a_cluster: whether the pipeline runs in a cluster, where variations may run at the same time.

    Raises:
        UserError: an option is empty, two options contradict each other, a sweep has no recipe, the recipe
            has no training data, the variations are invalid, or the model does not exist or was trained on
            other features.
    """
    model, sweep, parallel = options["model"], options["sweep"], options.get("parallel", 0)
    # An unset variable in a script gives an empty option, which is most likely a mistake.
    refuse_empty({name: options.get(name) for name in ("model", "sweep", "corpus", "store", "output")})
    if parallel < 0 or (parallel and not sweep):
        raise ConfigurationError(f"--parallel is {parallel}: it must be 0 or more, and requires --sweep.")
    if model and sweep:
        raise ConfigurationError(
            "--model and --sweep are both given: a model that is only evaluated has nothing to vary; "
            "give one of them."
        )
    if recipe is None:
        if sweep:
            raise ConfigurationError(
                "--sweep needs the recipe that it varies: name it first, as in `compile RECIPE --sweep FILE`."
            )
        return RunRequest(model=model)
    if model is None:
        if not recipe.data.train:
            raise ConfigurationError(
                f"Recipe {recipe.name}: data.train names no subset; give at least one, such as [train-*], "
                "or a model to evaluate with --model."
            )
        if sweep is None:
            return RunRequest(recipe)
        variations = resolve(recipe, read_variations(sweep))
        # Variations with the same training would write the same checkpoints at the same time.
        if in_a_cluster and parallel != 1:
            require_distinct_trainings(recipe, variations)
        return RunRequest(recipe, variations=variations, parallel=parallel)
    # An evaluation needs only test sets. Features of training data would be extracted for nothing.
    recipe = replace(recipe, data=replace(recipe.data, train=[], dev=[]))
    if not is_s3(model):
        # Imported here because it imports torch.
        from slam_asr.conversion.trained import require_same_features

        require_same_features(recipe, model, read_config(model))
    return RunRequest(recipe, model if in_a_cluster else absolute_model(model))


def absolute_model(model: str) -> str:
    """Make the path of a local model absolute; return shipped names and s3:// prefixes unchanged."""
    return model if is_s3(model) or model in shipped_models() else str(local_path(model).absolute())
