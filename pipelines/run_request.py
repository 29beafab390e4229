"""Which pipeline a command line asks for: one that trains, one that only measures a model (`--model`), or a sweep (`--sweep`)."""

from dataclasses import dataclass, field, replace
from typing import Any

from jsonargparse import ArgumentParser

from components import EVALUATION_RESULTS, RESULTS, SWEEP_RESULTS
from pipelines import EVALUATION, SWEEP, TRAINING
from slam_asr.conversion.shipped import shipped_models
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe
from slam_asr.storage import is_s3, local_path
from slam_asr.sweeping.variations import Variation, read_variations, require_trainings_of_their_own, resolve


@dataclass
class RunRequest:
    """A pipeline and what it runs with."""

    recipe: Recipe | None = None
    """None where a pipeline is compiled whose recipe is named when it is submitted."""
    model: str | None = None
    variations: list[Variation] = field(default_factory=list)
    parallel: int = 0
    """Variations that run at the same time in a cluster; 0 for all."""

    @property
    def pipeline(self) -> str:
        """Its name in Kubeflow."""
        return SWEEP if self.variations else TRAINING if self.model is None else EVALUATION

    @property
    def results(self) -> dict[str, str]:
        """Its steps, with the output of each that points to its folder."""
        return {TRAINING: RESULTS, EVALUATION: EVALUATION_RESULTS, SWEEP: SWEEP_RESULTS}[self.pipeline]

    @property
    def nodes(self) -> int:
        """Machines that each training takes; none is taken where nothing is trained."""
        return self.recipe.training.nodes if self.recipe and self.model is None else 1

    @property
    def parameters(self) -> dict[str, Any]:
        """What the pipeline takes beside corpus, store and recipe."""
        if self.variations:
            return {
                "variations": [
                    {"name": variation.name, **variation.overrides} for variation in self.variations
                ]
            }
        return {"model": self.model} if self.model else {}

    def base_models(self) -> tuple[list[str], list[str]]:
        """The names of all encoders and LLMs that a run needs: the recipe's and its variations', or the LLM that the model was trained with."""
        from slam_asr.conversion.model import read_config
        from slam_asr.sweeping.variations import varied

        if self.model:
            llms = [read_config(self.model).typed_recipe.llm.name]
        else:
            llms = [
                recipe.llm.name
                for recipe in (
                    self.recipe,
                    *(varied(self.recipe, variation) for variation in self.variations),
                )
            ]
        return [self.recipe.encoder.name], list(dict.fromkeys(llms))


def add_pipeline_options(parser: ArgumentParser, in_a_cluster: bool) -> None:
    """Give a parser the options that choose the pipeline."""
    places = "an s3:// prefix" if in_a_cluster else "a folder, an s3:// prefix"
    parser.add_argument(
        "--model",
        type=str,
        help=f"train nothing, and measure this model: {places}, or the name of a shipped one",
    )
    parser.add_argument(
        "--sweep",
        type=str,
        help="train each variation that this YAML file names over the same features, and compare them: a list of changes, or a grid",
    )
    if in_a_cluster:
        parser.add_argument(
            "--parallel",
            type=int,
            default=0,
            help="sweep: variations that run at the same time (default: all)",
        )


def wanted_of(options: dict[str, Any], recipe: Recipe | None, in_a_cluster: bool) -> RunRequest:
    """The pipeline that the options ask for.

    A model that lies here is compared with the recipe at once; one in object storage is by the pipeline's first step.

    Args:
        options: parsed, with those of `add_pipeline_options`.
        recipe: the one named, if any.
        in_a_cluster: whether variations may run at the same time.

    Raises:
        UserError: nothing to train on, a model that was trained on other features, variations that cannot be, or both a model and a sweep.
    """
    model, sweep, parallel = options["model"], options["sweep"], options.get("parallel", 0)
    if parallel < 0 or (parallel and not sweep):
        raise UserError(f"--parallel is {parallel}: it is 0 or more, and goes with --sweep.")
    if model and sweep:
        raise UserError(
            "--model and --sweep are both given: a model that is only measured has nothing to vary; give one of them."
        )
    if recipe is None:
        if sweep:
            raise UserError(
                "--sweep needs the recipe that it varies: name it first, as in `compile RECIPE --sweep FILE`."
            )
        return RunRequest(model=model)
    if model is None:
        if not recipe.data.train:
            raise UserError(
                f"Recipe {recipe.name}: data.train names no subset; give at least one, such as [train-*], or a model to measure with --model."
            )
        if sweep is None:
            return RunRequest(recipe)
        variations = resolve(recipe, read_variations(sweep))
        if in_a_cluster and parallel != 1:
            require_trainings_of_their_own(recipe, variations)
        return RunRequest(recipe, variations=variations, parallel=parallel)
    recipe = replace(recipe, data=replace(recipe.data, train=[], dev=[]))
    if not is_s3(model):
        # Not at the top: torch comes with it.
        from slam_asr.conversion.model import read_config
        from slam_asr.conversion.trained import require_same_features

        require_same_features(recipe, model, read_config(model))
    return RunRequest(recipe, model if in_a_cluster else place_of_model(model))


def place_of_model(model: str) -> str:
    """A model as the steps find it: a folder by its absolute path, any other as it is named."""
    return model if is_s3(model) or model in shipped_models() else str(local_path(model).absolute())
