"""`python -m pipelines compile`: write the pipeline and each component as YAML.

The output is reproducible: the same source gives the same bytes.
"""

import ast
import copy
import itertools
import json
import os
import pprint
import re
import sys
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from components import DEFAULT_IMAGES, IMAGES_VARIABLE, component_of
from components import images as images_of
from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster, shipped_clusters
from pipelines.run_request import RunRequest, add_pipeline_options, parse_with_recipe, request_from_options
from slam_asr.artifacts.model_folder import shipped_models
from slam_asr.config.recipe import Recipe, load_recipe, recipe_keys, shipped_recipes, value_of
from slam_asr.errors import ConfigurationError
from slam_asr.options import add_options, refuse_empty
from slam_asr.steps import EVALUATION, PUBLISHING, STEPS, SWEEP
from slam_asr.storage import is_s3, local_path

if TYPE_CHECKING:
    from kfp.dsl import PipelineTask
    from kfp.dsl.base_component import BaseComponent

DEFAULT_CLUSTER = "one-gpu-node"

OLDEST_BACKEND = "2.16"
"""The oldest Kubeflow Pipelines that accepts the compiled pipelines.

An earlier version fails to read their Kubernetes settings, with `unknown field "securityContext"`
(https://github.com/kubeflow/kale/issues/687).
"""


def compile_command(arguments: list[str]) -> int:
    """Run the command `compile`, print the paths of the files that it wrote, and return the exit code."""
    parser = command_parser(
        "compile", "Write the pipeline and each component as YAML. The same source gives the same bytes."
    )
    add_cluster_options(parser)
    parser.add_argument(
        "--output", default="build/kfp", help="folder for all files, or a .yaml file for the pipeline alone"
    )
    add_pipeline_options(parser, in_a_cluster=True)
    options, recipe = parse_with_recipe(parser, arguments, required=False)
    cluster, request, defaults = check_request(options, recipe)
    written = compile_all(cluster, local_path(options["output"]), options["images"], defaults, request)
    print(
        f"needs Kubeflow Pipelines {OLDEST_BACKEND} or later: earlier ones do not know the security context "
        "(user, group, non-root) that every step sets, and refuse the pipeline",
        file=sys.stderr,
    )
    described = cluster.description or options["cluster"]
    print(f"compiled for the cluster {cluster.name} ({described})", file=sys.stderr)
    for path in written:
        print(path)
    return 0


@dataclass
class LocationOptions:
    """Options of compiling and submitting that name images and locations."""

    images: str | None = None
    """images of the steps: a template with {stage} and {version}, or the file that `make images` writes
    (default: SLAM_ASR_IMAGES, else the profile's images.names)"""
    corpus: str | None = None
    """s3:// prefix of the corpus, for the pipeline parameter `corpus`"""
    store: str | None = None
    """s3:// prefix for the results of all stages (default: the profile's storage.store)"""


def add_cluster_options(parser: ArgumentParser) -> None:
    """Add to a parser the options that compiling and submitting need."""
    parser.add_argument(
        "--cluster",
        default=DEFAULT_CLUSTER,
        help=f"a shipped cluster profile ({', '.join(shipped_clusters())}) or a YAML file",
    )
    add_options(parser, LocationOptions)


def check_request(
    options: dict[str, Any], recipe: Recipe | None
) -> tuple[Cluster, RunRequest, dict[str, Any]]:
    """Check what the options of a command that compiles the pipeline request.

    Args:
        options: the parsed options.
        recipe: the resolved recipe, if the command names one.

    Returns:
        The cluster profile, what is to run, and the pipeline parameters.

    Raises:
        UserError: the profile, the recipe or an option is wrong.
    """
    cluster = load_cluster(options["cluster"])
    request = request_from_options(options, recipe, in_a_cluster=True)
    parameters = location_parameters(cluster, options["corpus"], options["store"], request.model)
    parameters |= request.parameters
    if request.recipe:
        check_recipe(request, cluster)
        parameters |= recipe_parameters(options["source"], request.recipe)
    require_no_templates(parameters)
    return cluster, request, parameters


def location_parameters(
    cluster: Cluster, corpus: str | None, store: str | None, model: str | None = None
) -> dict[str, Any]:
    """Return the pipeline parameters `corpus`, `store` and `model`, if the options or the profile name them.

    Raises:
        ConfigurationError: one of them is a path on this machine, which pods cannot read, or is empty.
        StorageError: one of them is an address without a bucket.
    """
    refuse_empty({"corpus": corpus, "store": store, "model": model})
    locations = {"corpus": corpus, "store": store or cluster.storage.store, "model": model}
    for name, path in locations.items():
        if path and not is_s3(path) and not (name == "model" and path in shipped_models()):
            raise ConfigurationError(
                f"--{name} is {path}, a path on this machine, which the cluster's pods cannot read: "
                "copy it to object storage and give its s3:// prefix."
            )
    return {name: path for name, path in locations.items() if path}


def check_recipe(request: RunRequest, cluster: Cluster) -> None:
    """Check that the recipe and all its variations fit the profile.

    Raises:
        ConfigurationError: the recipe gives a step more processes than the profile gives it GPUs.
    """
    for recipe, (name, step) in itertools.product(request.variants, STEPS.items()):
        # On CPUs, the number of processes has no such limit.
        gpus = cluster.steps[name].gpus if step.processes else 0
        # Steps are recognised by their outputs: without a cache nothing is extracted, and an evaluation
        # trains nothing.
        unused = {"features": not recipe.caches_features, "checkpoint": request.model is not None}
        if gpus and not unused.get(step.output) and (processes := value_of(recipe, step.processes)) > gpus:
            key = f"steps.{name.replace('-', '_')}.gpus"
            raise ConfigurationError(
                f"Recipe {recipe.name}: {step.processes} is {processes}, but the cluster {cluster.name} "
                f"gives each pod of {name} {gpus} GPU{'s' if gpus > 1 else ''} ({key}): lower "
                f"{step.processes}, or set it to 0 to use all GPUs."
            )


def recipe_parameters(source: str, recipe: Recipe) -> dict[str, Any]:
    """Return the pipeline parameters that reproduce a recipe.

    Args:
        source: name of a shipped recipe, or path of a file. A shipped recipe is passed by name, with
            overrides; a file is passed as text.
        recipe: the resolved recipe, with the changes of the command line.
    """
    if source in shipped_recipes():
        shipped = load_recipe(source)
        # recipe_keys() lists sections as well as their keys. The keys suffice as overrides.
        values = {key: value_of(recipe, key) for key in recipe_keys()}
        changed = {
            key: value
            for key, value in values.items()
            if not is_dataclass(value) and value != value_of(shipped, key)
        }
        return {"recipe": source, "recipe_overrides": changed}
    # The text is on one line, because kfp repeats default values in a YAML comment, and does not escape line
    # breaks there.
    return {"recipe": json.dumps(asdict(recipe), ensure_ascii=False), "recipe_overrides": {}}


def require_no_templates(parameters: dict[str, Any]) -> None:
    """Refuse parameters in which Argo would replace text.

    Kubeflow passes them through Argo's workflow, where `{{workflow.name}}` is a template.

    Raises:
        ConfigurationError: a parameter contains `{{`.
    """
    for name, value in parameters.items():
        text = json.dumps(value, ensure_ascii=False)
        if "{{" in text:
            shown = "".join(text[text.index("{{") :].partition("}}")[:2])[:60]
            raise ConfigurationError(
                f"The parameter {name} contains {shown!r}, which Argo takes for a template of its own: "
                "leave out the double braces."
            )


def compile_package(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    request: RunRequest | None = None,
) -> Path:
    """Write the pipeline's YAML for a cluster, and check its consistency.

    Args:
        cluster: resources and settings of each step.
        output: the file.
        images: template or file of image names; default: the environment's, else the profile's.
        defaults: default values of pipeline parameters.
        request: selects the pipeline; default: training.

    Returns:
        `output`.

    Raises:
        ConfigurationError: an image name is invalid, or the file of image names cannot be read or lacks a
            stage.
        PackageDefect: the compiled pipeline is inconsistent.
    """
    from pipelines.package_check import check_package

    image_of = images_of(images_source(cluster, images))
    _write(_pipeline(cluster, image_of, request or RunRequest()), output, defaults)
    check_package(output, image_of)
    return output


def compile_all(
    cluster: Cluster,
    output: Path,
    images: str | None = None,
    defaults: dict[str, Any] | None = None,
    request: RunRequest | None = None,
) -> list[Path]:
    """Write the pipeline, the same pipeline as Kubernetes resources, and each component to `output`.

    If `output` is a `.yaml` file, only the pipeline is written. The arguments are those of `compile_package`.

    Returns:
        The files written: `slam-asr.yaml`, `slam-asr.resources.yaml` and `components/*.yaml`. Files of
        another pipeline have its name in place of `slam-asr`, such as `slam-asr-sweep.yaml`.
    """
    if output.suffix in (".yaml", ".yml"):
        return [compile_package(cluster, output, images, defaults, request)]
    request = request or RunRequest()
    package = compile_package(cluster, output / f"{request.pipeline}.yaml", images, defaults, request)
    image_of, resources = images_of(images_source(cluster, images)), package.with_suffix(".resources.yaml")
    _write(_pipeline(cluster, image_of, request), resources, defaults, resources_in=cluster.namespace)
    components = [_write_component(step, image_of[step], output / "components") for step in STEPS]
    return [package, resources, *components]


def _pipeline(cluster: Cluster, images: dict[str, str], request: RunRequest) -> "BaseComponent":
    # Imported here, because they import kfp, which is slow.
    from pipelines import asr, evaluate, sweep
    from pipelines.notice import with_notice, without_notice
    from pipelines.placement import place, placement

    nodes = request.nodes

    def place_step(step: str, task: "PipelineTask") -> None:
        place(cluster, images, step, task, by_trainjob=step == "train" and nodes > 1)

    ending = with_notice(cluster, place_step) if cluster.on_exit.format else without_notice
    if request.pipeline == EVALUATION:
        return evaluate.build_pipeline(place_step, ending)
    trainjob = placement(cluster, images["train"]) if nodes > 1 else ""
    if request.pipeline == SWEEP:
        return sweep.build_pipeline(place_step, trainjob, request.parallel, ending)
    return asr.build_pipeline(place_step, trainjob, request.pipeline == PUBLISHING, ending)


def images_source(cluster: Cluster, images: str | None) -> str:
    """Return the template or file of image names from the option, else the environment, else the profile."""
    return images or os.environ.get(IMAGES_VARIABLE) or cluster.images.names or DEFAULT_IMAGES


def _write(
    pipeline: "BaseComponent", path: Path, defaults: dict[str, Any] | None, resources_in: str | None = None
) -> None:
    from kfp.compiler import Compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    from slam_asr import __version__

    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
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
    path.write_text(_DEFAULT_IN_COMMENT.sub(_sort_keys, path.read_text(encoding="utf-8")), encoding="utf-8")


_DEFAULT_IN_COMMENT = re.compile(r"(?m)^(# +\w+: (?:dict|list) \[Default: )([{\[].*[}\]])\]$")
"""Matches a default value in the comment that kfp writes.

kfp writes the value's keys in the order of protobuf's maps, which changes from run to run, so `_write` sorts
them.
"""


def _sort_keys(comment: re.Match[str]) -> str:
    # kfp writes the value as Python does (True, None), not as JSON.
    return f"{comment[1]}{pprint.pformat(ast.literal_eval(comment[2]), width=sys.maxsize)}]"


def _write_component(step: str, image: str, folder: Path) -> Path:
    """Write a single component, for use in other pipelines."""
    from kfp.compiler import Compiler

    # A copy, because its image is changed and the pipelines use the same component.
    component = copy.deepcopy(component_of(step))
    container = component.component_spec.implementation.container
    assert container is not None, "every step is a container component"
    container.image = image
    path = folder / f"{step}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    Compiler().compile(component, str(path))
    return path
