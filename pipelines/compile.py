"""`python -m pipelines compile`: the pipeline and each component as YAML, the same bytes from the same source."""

import ast
import copy
import json
import math
import os
import re
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from components import ALL_RESULTS, DEFAULT_IMAGES, IMAGES_VARIABLE, component_of
from components import images as images_of
from pipelines import EVALUATION, TRAINING
from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster, shipped_clusters
from pipelines.measuring import recipe_of_pipeline
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.conversion.shipped import shipped_models
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe, load_recipe, recipe_keys, shipped_recipes, value_of
from slam_asr.storage import is_s3, local_path

DEFAULT_CLUSTER = "one-gpu-node"


def compile_command(arguments: list[str]) -> int:
    """Compile, and print the files that were written → the exit code."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = command_parser("compile", "Write the pipeline and each component as YAML; the same source gives the same bytes.")
    add_cluster_options(parser)
    parser.add_argument("--output", default="build/kfp", help="a folder, or a .yaml file for the pipeline alone")
    parser.add_argument("--model", type=str, help="compile the pipeline that only measures this model: an s3:// prefix, or the name of a shipped one")
    if named:
        add_recipe_options(parser, arguments[0])
    options = parse_options(parser, arguments[1:] if named else arguments)
    cluster = load_cluster(options["cluster"])
    model = options["model"]
    defaults, nodes = places(cluster, options["corpus"], options["store"], model), 1
    if named:
        source = options["recipe"]
        recipe = recipe_of_pipeline(pop_recipe(options), model)
        check_recipe(recipe, cluster)
        defaults |= recipe_parameters(source, recipe)
        nodes = recipe.training.nodes
    written = compile_all(cluster, local_path(options["output"]), options["images"], defaults, nodes, model is not None)
    print(f"compiled for the cluster {cluster.name} ({cluster.description or options['cluster']})", file=sys.stderr)
    for path in written:
        print(path)
    return 0


def add_cluster_options(parser: Any) -> None:
    """Give a parser the options that compiling for a cluster takes."""
    parser.add_argument("--cluster", default=DEFAULT_CLUSTER, help=f"a shipped cluster profile ({', '.join(shipped_clusters())}) or a YAML file")
    parser.add_argument(
        "--images", type=str, help=f"the steps' images: a template with {{stage}} and {{version}}, or the file that `make images` writes; "
        f"else {IMAGES_VARIABLE}, else the profile's images.names",
    )  # fmt: skip
    parser.add_argument("--corpus", type=str, help="s3:// prefix of the corpus: the default of the pipeline's parameter")
    parser.add_argument("--store", type=str, help="s3:// prefix for the results of all stages (default: the profile's storage.store)")


def places(cluster: Cluster, corpus: str | None, store: str | None, model: str | None = None) -> dict[str, str]:
    """The pipeline's parameters `corpus`, `store` and `model`, as far as options and profile name them.

    Raises:
        UserError: a place on this machine, which no pod can see.
    """
    named = {"corpus": corpus, "store": store or cluster.storage.store, "model": model}
    for name, path in named.items():
        if path and not is_s3(path) and not (name == "model" and path in shipped_models()):
            raise UserError(f"--{name} is {path}, a place on this machine, which no pod of the cluster sees: copy it to object storage and give its s3:// prefix.")
    return {name: path for name, path in named.items() if path}


def check_recipe(recipe: Recipe, cluster: Cluster) -> None:
    """Refuse a recipe that asks for more than the profile gives.

    Raises:
        UserError: more processes than GPUs.
    """
    gpus = cluster.steps["train"].gpus
    if gpus and recipe.training.processes > gpus:
        raise UserError(
            f"Recipe {recipe.name}: training.processes is {recipe.training.processes}, but the cluster {cluster.name} gives each node of train "
            f"{gpus} GPUs (steps.train.gpus): lower it, or leave it at 0 to use them all."
        )
    if recipe.caches_features and recipe.features.processes > (cluster.steps["extract-features"].gpus or math.inf):
        raise UserError(
            f"Recipe {recipe.name}: features.processes is {recipe.features.processes}, but the cluster {cluster.name} gives extract-features "
            f"{cluster.steps['extract-features'].gpus} GPUs (steps.extract_features.gpus): lower it, or leave it at 0 to use them all."
        )


def recipe_parameters(source: str, recipe: Recipe) -> dict[str, Any]:
    """The pipeline's parameters that give this recipe: a shipped recipe's name with what was changed of it, or all of it as text."""
    if source in shipped_recipes():
        shipped = load_recipe(source)
        changed = {key: value_of(recipe, key) for key in recipe_keys() if value_of(recipe, key) != value_of(shipped, key)}
        return {"recipe": source, "recipe_overrides": {key: value for key, value in changed.items() if not is_dataclass(value)}}
    # In one line: kfp repeats default values in a comment, and minds no line break there.
    return {"recipe": json.dumps(asdict(recipe), ensure_ascii=False), "recipe_overrides": {}}


def compile_package(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    nodes: int = 1,
    evaluation: bool = False,
) -> Path:
    """Write the pipeline's YAML for a cluster, and check that it hangs together.

    Args:
        cluster: what each step gets.
        output: the file.
        images: a template or a file; the environment's or the profile's if not given.
        defaults: values of the pipeline's parameters that a run need not name.
        nodes: machines to train on; above 1, a TrainJob trains.
        evaluation: the pipeline that only measures a model.

    Raises:
        UserError: images that cannot be.
    """
    from pipelines.checking import check_package

    named = images_of(images_source(cluster, images))
    _write(_pipeline(cluster, named, nodes, evaluation), output, defaults)
    check_package(output, named)
    return output


def compile_all(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    nodes: int = 1,
    evaluation: bool = False,
) -> list[Path]:
    """Write the pipeline, the same as resources of Kubernetes, and each component, below `output`; the pipeline alone to a file `*.yaml`.

    Returns:
        The files written: `slam-asr.yaml`, `slam-asr.resources.yaml` and `components/*.yaml`; of the pipeline that only measures, `slam-asr-evaluate.yaml` and so on.
    """
    if output.suffix in (".yaml", ".yml"):
        return [compile_package(cluster, output, images, defaults, nodes, evaluation)]
    named = images_of(images_source(cluster, images))
    name = EVALUATION if evaluation else TRAINING
    written = [compile_package(cluster, output / f"{name}.yaml", images, defaults, nodes, evaluation)]
    resources = output / f"{name}.resources.yaml"
    _write(_pipeline(cluster, named, nodes, evaluation), resources, defaults, resources_in=cluster.namespace)
    return [*written, resources, *(_component(stage, named[stage], output / "components" / f"{stage}.yaml") for stage in ALL_RESULTS)]


def _pipeline(cluster: Cluster, images: dict[str, str], nodes: int, evaluation: bool) -> Any:
    from pipelines import evaluate
    from pipelines.asr import build_pipeline
    from pipelines.placing import place, placement

    if evaluation:
        return evaluate.build_pipeline(lambda stage, task: place(cluster, images, stage, task))
    return build_pipeline(
        lambda stage, task: place(cluster, images, stage, task, over_nodes=stage == "train" and nodes > 1),
        trainjob=placement(cluster, images["train"]) if nodes > 1 else "",
    )


def images_source(cluster: Cluster, images: str | None) -> str:
    """Where the images' names come from: what was asked for, the environment, or the profile."""
    return images or os.environ.get(IMAGES_VARIABLE) or cluster.images.names or DEFAULT_IMAGES


def _write(pipeline: Any, path: Path, defaults: dict[str, Any] | None, resources_in: str | None = None) -> None:
    from kfp.compiler import Compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    from slam_asr import __version__

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if resources_in:
        name = pipeline.name
        options = {
            "kubernetes_manifest_format": True,
            "kubernetes_manifest_options": KubernetesManifestOptions(
                pipeline_name=name, pipeline_display_name="SLAM-ASR", pipeline_version_name=f"{name}-{__version__}",
                pipeline_version_display_name=f"SLAM-ASR {__version__}", namespace=resources_in, include_pipeline_manifest=True,
            ),
        }  # fmt: skip
    Compiler().compile(pipeline, str(path), pipeline_parameters=defaults, **options)
    path.write_text(_DICTIONARY.sub(_sorted, path.read_text(encoding="utf-8")), encoding="utf-8")


_DICTIONARY = re.compile(r"(?m)^(# +\w+: dict \[Default: )(\{.*\})\]$")
"""A default value in the comment that kfp writes, in the order of protobuf's maps, which is another one each time."""


def _sorted(comment: re.Match[str]) -> str:
    return f"{comment[1]}{dict(sorted(ast.literal_eval(comment[2]).items()))}]"


def _component(stage: str, image: str, path: Path) -> Path:
    """Write one component by itself, for pipelines of one's own."""
    from kfp.compiler import Compiler

    component = copy.deepcopy(component_of(stage))
    component.component_spec.implementation.container.image = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(component, str(path))
    return path
