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
from pipelines import EVALUATION, SWEEP
from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster, shipped_clusters
from pipelines.run_request import RunRequest, add_pipeline_options, wanted_of
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.conversion.shipped import shipped_models
from slam_asr.errors import UserError
from slam_asr.recipe import Recipe, load_recipe, recipe_keys, shipped_recipes, value_of
from slam_asr.storage import is_s3, local_path
from slam_asr.sweeping.variations import varied

DEFAULT_CLUSTER = "one-gpu-node"


def compile_command(arguments: list[str]) -> int:
    """Compile, and print the files that were written → the exit code."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = command_parser(
        "compile", "Write the pipeline and each component as YAML; the same source gives the same bytes."
    )
    add_cluster_options(parser)
    parser.add_argument(
        "--output", default="build/kfp", help="a folder, or a .yaml file for the pipeline alone"
    )
    add_pipeline_options(parser, in_a_cluster=True)
    if named:
        add_recipe_options(parser, arguments[0])
    options = parse_options(parser, arguments[1:] if named else arguments)
    cluster = load_cluster(options["cluster"])
    source = options.get("recipe")
    wanted = wanted_of(options, pop_recipe(options) if named else None, in_a_cluster=True)
    defaults = places(cluster, options["corpus"], options["store"], wanted.model) | wanted.parameters
    if wanted.recipe:
        check_recipe(wanted, cluster)
        defaults |= recipe_parameters(source, wanted.recipe)
    written = compile_all(cluster, local_path(options["output"]), options["images"], defaults, wanted)
    print(
        f"compiled for the cluster {cluster.name} ({cluster.description or options['cluster']})",
        file=sys.stderr,
    )
    for path in written:
        print(path)
    return 0


def add_cluster_options(parser: Any) -> None:
    """Give a parser the options that compiling for a cluster takes."""
    parser.add_argument(
        "--cluster",
        default=DEFAULT_CLUSTER,
        help=f"a shipped cluster profile ({', '.join(shipped_clusters())}) or a YAML file",
    )
    parser.add_argument(
        "--images",
        type=str,
        help=f"the steps' images: a template with {{stage}} and {{version}}, or the file that `make images` writes; "
        f"else {IMAGES_VARIABLE}, else the profile's images.names",
    )
    parser.add_argument(
        "--corpus", type=str, help="s3:// prefix of the corpus: the default of the pipeline's parameter"
    )
    parser.add_argument(
        "--store",
        type=str,
        help="s3:// prefix for the results of all stages (default: the profile's storage.store)",
    )


def places(
    cluster: Cluster, corpus: str | None, store: str | None, model: str | None = None
) -> dict[str, Any]:
    """The pipeline's parameters `corpus`, `store` and `model`, as far as options and profile name them.

    Raises:
        UserError: a place on this machine, which no pod can see.
    """
    named = {"corpus": corpus, "store": store or cluster.storage.store, "model": model}
    for name, path in named.items():
        if path and not is_s3(path) and not (name == "model" and path in shipped_models()):
            raise UserError(
                f"--{name} is {path}, a place on this machine, which no pod of the cluster sees: copy it to object storage and give its s3:// prefix."
            )
    return {name: path for name, path in named.items() if path}


def check_recipe(wanted: RunRequest, cluster: Cluster) -> None:
    """Refuse a recipe, or a variation of it, that asks for more than the profile gives.

    Raises:
        UserError: more processes than GPUs.
    """
    for recipe in (wanted.recipe, *(varied(wanted.recipe, variation) for variation in wanted.variations)):
        _check_recipe(recipe, cluster)


def _check_recipe(recipe: Recipe, cluster: Cluster) -> None:
    gpus = cluster.steps["train"].gpus
    if gpus and recipe.training.processes > gpus:
        raise UserError(
            f"Recipe {recipe.name}: training.processes is {recipe.training.processes}, but the cluster {cluster.name} gives each node of train "
            f"{gpus} GPUs (steps.train.gpus): lower it, or leave it at 0 to use them all."
        )
    for key, step, runs in (
        ("features.processes", "extract-features", recipe.caches_features),
        ("decoding.processes", "decode", True),
    ):
        wanted, gpus = value_of(recipe, key), cluster.steps[step].gpus
        if runs and wanted > (gpus or math.inf):
            raise UserError(
                f"Recipe {recipe.name}: {key} is {wanted}, but the cluster {cluster.name} gives {step} {gpus} GPUs "
                f"(steps.{step.replace('-', '_')}.gpus): lower it, or leave it at 0 to use them all."
            )


def recipe_parameters(source: str, recipe: Recipe) -> dict[str, Any]:
    """The pipeline's parameters that give this recipe: a shipped recipe's name with what was changed of it, or all of it as text."""
    if source in shipped_recipes():
        shipped = load_recipe(source)
        changed = {
            key: value_of(recipe, key)
            for key in recipe_keys()
            if value_of(recipe, key) != value_of(shipped, key)
        }
        return {
            "recipe": source,
            "recipe_overrides": {key: value for key, value in changed.items() if not is_dataclass(value)},
        }
    # In one line: kfp repeats default values in a comment, and minds no line break there.
    return {"recipe": json.dumps(asdict(recipe), ensure_ascii=False), "recipe_overrides": {}}


def compile_package(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    wanted: RunRequest | None = None,
) -> Path:
    """Write the pipeline's YAML for a cluster, and check that it hangs together.

    Args:
        cluster: what each step gets.
        output: the file.
        images: a template or a file; the environment's or the profile's if not given.
        defaults: values of the pipeline's parameters that a run need not name.
        wanted: which pipeline; the one that trains if not given.

    Raises:
        UserError: images that cannot be.
    """
    from pipelines.package_check import check_package

    named = images_of(images_source(cluster, images))
    _write(_pipeline(cluster, named, wanted or RunRequest()), output, defaults)
    check_package(output, named)
    return output


def compile_all(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    wanted: RunRequest | None = None,
) -> list[Path]:
    """Write the pipeline, the same as resources of Kubernetes, and each component, below `output`; the pipeline alone to a file `*.yaml`.

    Returns:
        The files written: `slam-asr.yaml`, `slam-asr.resources.yaml` and `components/*.yaml`; of the other pipelines, `slam-asr-evaluate.yaml` and so on.
    """
    if output.suffix in (".yaml", ".yml"):
        return [compile_package(cluster, output, images, defaults, wanted)]
    wanted = wanted or RunRequest()
    named = images_of(images_source(cluster, images))
    written = [compile_package(cluster, output / f"{wanted.pipeline}.yaml", images, defaults, wanted)]
    resources = output / f"{wanted.pipeline}.resources.yaml"
    _write(_pipeline(cluster, named, wanted), resources, defaults, resources_in=cluster.namespace)
    return [
        *written,
        resources,
        *(_component(stage, named[stage], output / "components" / f"{stage}.yaml") for stage in ALL_RESULTS),
    ]


def _pipeline(cluster: Cluster, images: dict[str, str], wanted: RunRequest) -> Any:
    from pipelines import asr, evaluate, sweep
    from pipelines.placement import place, placement

    nodes = wanted.nodes

    def placed(stage: str, task: Any) -> None:
        place(cluster, images, stage, task, over_nodes=stage == "train" and nodes > 1)

    if wanted.pipeline == EVALUATION:
        return evaluate.build_pipeline(placed)
    trainjob = placement(cluster, images["train"]) if nodes > 1 else ""
    if wanted.pipeline == SWEEP:
        return sweep.build_pipeline(placed, trainjob, wanted.parallel)
    return asr.build_pipeline(placed, trainjob)


def images_source(cluster: Cluster, images: str | None) -> str:
    """Where the images' names come from: what was asked for, the environment, or the profile."""
    return images or os.environ.get(IMAGES_VARIABLE) or cluster.images.names or DEFAULT_IMAGES


def _write(
    pipeline: Any, path: Path, defaults: dict[str, Any] | None, resources_in: str | None = None
) -> None:
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
                pipeline_name=name,
                pipeline_display_name="SLAM-ASR",
                pipeline_version_name=f"{name}-{__version__}",
                pipeline_version_display_name=f"SLAM-ASR {__version__}",
                namespace=resources_in,
                include_pipeline_manifest=True,
            ),
        }
    Compiler().compile(pipeline, str(path), pipeline_parameters=defaults, **options)
    path.write_text(_DICTIONARY.sub(_sorted, path.read_text(encoding="utf-8")), encoding="utf-8")


_DICTIONARY = re.compile(r"(?m)^(# +\w+: (?:dict|list) \[Default: )([{\[].*[}\]])\]$")
"""A default value in the comment that kfp writes, in the order of protobuf's maps, which is another one each time."""


def _sorted(comment: re.Match[str]) -> str:
    return f"{comment[1]}{_in_order(ast.literal_eval(comment[2]))}]"


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(inner) for key, inner in sorted(value.items())}
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value


def _component(stage: str, image: str, path: Path) -> Path:
    """Write one component by itself, for pipelines of one's own."""
    from kfp.compiler import Compiler

    component = copy.deepcopy(component_of(stage))
    component.component_spec.implementation.container.image = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(component, str(path))
    return path
