"""`python -m pipelines submit`: compile, upload and start a run in a cluster."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster
from pipelines.compile import (
    add_cluster_options,
    check_recipe,
    compile_package,
    location_parameters,
    recipe_parameters,
    require_no_templates,
)
from pipelines.kubeflow.commands import add_wait, flags, follow_run, positional
from pipelines.kubeflow.connection import add_connection_options, connect, require_seconds
from pipelines.run_request import RunRequest, add_pipeline_options, request_from_options
from slam_asr.cli import add_recipe_options, pop_recipe
from slam_asr.config.recipe import shipped_recipes
from slam_asr.errors import ConfigurationError
from slam_asr.options import parse_options

if TYPE_CHECKING:
    from pipelines.kubeflow.connection import Connection


@dataclass
class Submission:
    """What a command line asks to run, checked without any connection."""

    cluster: Cluster
    request: RunRequest
    parameters: dict[str, Any]
    """The pipeline parameters."""
    options: dict[str, Any]
    """All parsed options."""


def submit(arguments: list[str]) -> int:
    """Compile, upload and start a run, follow it if requested, and return the exit code."""
    source, rest = recipe_and_rest("submit", arguments)
    parser = submission_parser(
        "submit", "Compile the pipeline, upload it and start a run; --wait follows it.", source
    )
    parser.add_argument("--run-name", type=str, help="name of the run (default: recipe, digest and time)")
    add_wait(parser)
    options = parse_options(parser, flags(rest))
    require_seconds(options, "poll")
    submission = checked(options, source)
    cluster = submission.cluster

    # These import kfp, which is slow, so a mistake in the options is reported first.
    from pipelines.kubeflow.runs import run_name, start

    with compiled(submission) as (connection, package):
        name = options["run_name"] or run_name(submission.request.resolved_recipe)
        run_id = start(
            connection,
            package,
            name,
            options["experiment"],
            submission.parameters,
            cluster.service_account,
            submission.request.pipeline,
        )
    print(f"run {run_id}: {name}\n{connection.link(run_id)}", flush=True)
    if not connection.multi_user and connection.namespace != (options["namespace"] or cluster.namespace):
        print(
            "This Kubeflow is for a single user, so the run is in the namespace "
            f"{connection.namespace}: account, secret and volume must be there"
        )
    if not options["wait"]:
        print(f"follow it with `python -m pipelines status {run_id} --wait`")
        return 0
    return follow_run(connection, run_id, cluster, options["poll"], with_notice=True)


def recipe_and_rest(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Split off the recipe, which comes first.

    Raises:
        ConfigurationError: it is missing.
    """
    return positional(
        arguments,
        f"RECIPE is missing: python -m pipelines {command} RECIPE, with a file or one of "
        + ", ".join(shipped_recipes()),
    )


def submission_parser(command: str, description: str, source: str) -> ArgumentParser:
    """Return a parser for the options that `submit` and `schedule create` have in common."""
    parser = command_parser(command, description)
    add_cluster_options(parser)
    add_connection_options(parser)
    parser.add_argument(
        "--experiment", type=str, default="slam-asr", help="experiment that groups the runs in the dashboard"
    )
    add_pipeline_options(parser, in_a_cluster=True)
    add_recipe_options(parser, source)
    return parser


def checked(options: dict[str, Any], source: str) -> Submission:
    """Check parsed options, and return what they ask to run.

    Args:
        options: values of the options of `submission_parser`.
        source: name of a shipped recipe, or path of a file.

    Raises:
        UserError: the profile, the recipe or an option is wrong, or corpus or store are missing.
    """
    cluster = load_cluster(options["cluster"])
    request = request_from_options(options, pop_recipe(options), in_a_cluster=True)
    check_recipe(request, cluster)
    parameters = (
        location_parameters(cluster, options["corpus"], options["store"], request.model)
        | request.parameters
        | recipe_parameters(source, request.resolved_recipe)
    )
    require_no_templates(parameters)
    for name, option in (
        ("corpus", "--corpus s3://…"),
        ("store", "--store s3://…, or storage.store in the profile"),
    ):
        if name not in parameters:
            raise ConfigurationError(f"The run has no {name}: give {option}.")
    return Submission(cluster, request, parameters, options)


@contextlib.contextmanager
def compiled(submission: Submission) -> Iterator[tuple["Connection", Path]]:
    """Compile the pipeline for the cluster, and connect to it; the package exists within the block.

    Raises:
        UserError: the images are wrong, or the cluster does not answer or lacks what the run needs.
    """
    from pipelines.kubeflow.trainer import require_trainer

    cluster, request, options = submission.cluster, submission.request, submission.options
    with tempfile.TemporaryDirectory(prefix="slam-asr-") as folder:
        package = compile_package(cluster, Path(folder) / "slam-asr.yaml", options["images"], request=request)
        connection = connect(options, cluster)
        if request.nodes > 1:
            require_trainer(cluster, connection.namespace)
            if connection.namespace != cluster.namespace:
                # The TrainJob must be in the namespace of the run, which only the server knows.
                there = replace(cluster, namespace=connection.namespace)
                compile_package(there, package, options["images"], request=request)
        yield connection, package
