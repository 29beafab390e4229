"""`python -m pipelines submit`: compile, upload and start a run in a cluster."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import command_parser
from pipelines.cluster import Cluster
from pipelines.compile import add_cluster_options, check_request, compile_package
from pipelines.kubeflow.commands import WaitOptions, flags, follow_run, require_seconds
from pipelines.kubeflow.connection import ConnectionOptions, connect
from pipelines.run_request import RunRequest, add_pipeline_options, parse_with_recipe
from slam_asr.errors import ConfigurationError
from slam_asr.options import add_options

if TYPE_CHECKING:
    from pipelines.kubeflow.connection import Connection


@dataclass
class Options:
    """Options that `submit` and `schedule create` have in common, besides those of the pipeline."""

    experiment: str = "slam-asr"
    """experiment that groups the runs in the dashboard"""


@dataclass
class NameOptions:
    """Options of `submit` alone, besides those of waiting."""

    run_name: str | None = None
    """name of the run (default: recipe, digest and time)"""


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
    description = "Compile the pipeline, upload it and start a run; --wait follows it."
    submission = parse_submission("submit", description, arguments, NameOptions, WaitOptions)
    options, cluster = submission.options, submission.cluster

    # These import kfp, which is slow, so a mistake in the options is reported first.
    from pipelines.kubeflow.runs import run_name, start

    with compiled(submission) as (connection, package):
        name = options["run_name"] or run_name(submission.request.resolved_recipe)
        run_id = start(
            connection, package, name, options["experiment"], submission.parameters, cluster.service_account
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


def parse_submission(command: str, description: str, arguments: list[str], *own_options: type) -> Submission:
    """Parse and check the command line of `submit` or `schedule create`.

    Args:
        command: the command.
        description: what the command does.
        arguments: the recipe and the options.
        own_options: dataclasses of the command's own options.

    Raises:
        UserError: the profile, the recipe or an option is wrong, or recipe, corpus or store are missing.
    """
    parser = command_parser(command, description)
    add_cluster_options(parser)
    for options_class in (ConnectionOptions, Options, *own_options):
        add_options(parser, options_class)
    add_pipeline_options(parser, in_a_cluster=True)
    options, recipe = parse_with_recipe(parser, flags(arguments), required=True)
    if "poll" in options:
        require_seconds(options, "poll")
    cluster, request, parameters = check_request(options, recipe)
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
