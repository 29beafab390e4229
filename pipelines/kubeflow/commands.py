"""`python -m pipelines submit | status | logs | resume`."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from pipelines.cli import command_parser
from pipelines.cluster import load_cluster
from pipelines.compile import (
    DEFAULT_CLUSTER,
    add_cluster_options,
    check_recipe,
    compile_package,
    places,
    recipe_parameters,
)
from pipelines.kubeflow.connection import add_connection_options, connect
from pipelines.run_request import add_pipeline_options, wanted_of
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.errors import UserError
from slam_asr.recipe import shipped_recipes

POLL = 5.0


def submit(arguments: list[str]) -> int:
    """Compile, upload, start, and follow where asked → the exit code."""
    source, rest = _named(
        arguments,
        "RECIPE is missing: python -m pipelines submit RECIPE, with a file or one of "
        + ", ".join(shipped_recipes()),
    )
    parser = command_parser("submit", "Compile the pipeline, upload it, start a run, and follow it.")
    add_cluster_options(parser)
    add_connection_options(parser)
    parser.add_argument("--experiment", type=str, default="slam-asr", help="the dashboard's group of runs")
    parser.add_argument("--run_name", type=str, help="default: recipe, models and time")
    _add_wait(parser)
    add_pipeline_options(parser, in_a_cluster=True)
    add_recipe_options(parser, source)
    options = parse_options(parser, _flags(rest))
    cluster = load_cluster(options["cluster"])
    wanted = wanted_of(options, pop_recipe(options), in_a_cluster=True)
    check_recipe(wanted, cluster)
    parameters = (
        places(cluster, options["corpus"], options["store"], wanted.model)
        | wanted.parameters
        | recipe_parameters(source, wanted.recipe)
    )
    for name, option in (
        ("corpus", "--corpus s3://…"),
        ("store", "--store s3://…, or storage.store in the profile"),
    ):
        if name not in parameters:
            raise UserError(f"The run has no {name}: give {option}.")

    from pipelines.kubeflow.doctor import require_trainer
    from pipelines.kubeflow.runs import follow, run_name, start

    with tempfile.TemporaryDirectory(prefix="slam-asr-") as folder:
        package = compile_package(cluster, Path(folder) / "slam-asr.yaml", options["images"], wanted=wanted)
        connection = connect(options, cluster)
        if wanted.nodes > 1:
            require_trainer(cluster)
        name = options["run_name"] or run_name(wanted.recipe)
        run_id = start(
            connection,
            package,
            name,
            options["experiment"],
            parameters,
            cluster.service_account,
            wanted.pipeline,
        )
    print(f"run {run_id}: {name}\n{connection.link(run_id)}", flush=True)
    if not options["wait"]:
        print(f"follow it with `python -m pipelines status {run_id} --wait true`")
        return 0
    return _followed(lambda: follow(connection, run_id, _say, options["poll"]), run_id)


def status(arguments: list[str]) -> int:
    """A run's steps, or the latest runs → the exit code."""
    wanted, options = _of_a_run("status", "Show a run's steps, or the latest runs.", arguments, wait=True)
    from pipelines.kubeflow.runs import find, follow, latest, steps_of

    connection = connect(options, load_cluster(options["cluster"]))
    if wanted is None:
        for run in latest(connection, 10):
            print(f"{run.run_id}  {(run.state or 'PENDING').lower():<10} {run.display_name}")
        return 0
    run = find(connection, wanted)
    print(
        f"{run.display_name}: {(run.state or 'PENDING').lower()}\n{connection.link(run.run_id)}", flush=True
    )
    if options["wait"]:
        return _followed(lambda: follow(connection, run.run_id, _say, options["poll"]), run.run_id)
    for step in steps_of(run):
        print(step.line())
    return 0


def logs(arguments: list[str]) -> int:
    """The lines of a run's steps → the exit code."""
    parser = _run_parser("logs", "Show the lines of a run's steps, from the Kubernetes API.")
    parser.add_argument("--step", type=str, help="only this step's")
    parser.add_argument("--follow", type=bool, default=False, help="wait for more, until the step has ended")
    wanted, rest = _named(
        arguments,
        "RUN is missing: python -m pipelines logs RUN; `python -m pipelines status` lists the latest",
    )
    options = parse_options(parser, _flags(rest))
    from pipelines.kubeflow.logs import core_api, show
    from pipelines.kubeflow.runs import find

    cluster = load_cluster(options["cluster"])
    api = core_api()
    connection = connect(options, cluster)
    run = find(connection, wanted)
    return _followed(
        lambda: show(api, connection.namespace, run.run_id, options["step"], options["follow"], _say) or 0,
        run.run_id,
    )


def resume(arguments: list[str]) -> int:
    """Start a failed run again from where it failed → the exit code."""
    wanted, options = _of_a_run(
        "resume", "Start a failed run again, from the steps that failed.", arguments, wait=True
    )
    if wanted is None:
        raise UserError(
            "RUN is missing: python -m pipelines resume RUN; `python -m pipelines status` lists the latest."
        )
    from pipelines.kubeflow.runs import find, follow, retry

    connection = connect(options, load_cluster(options["cluster"]))
    run = find(connection, wanted)
    retry(connection, run)
    print(f"{run.display_name} goes on\n{connection.link(run.run_id)}", flush=True)
    return (
        _followed(lambda: follow(connection, run.run_id, _say, options["poll"]), run.run_id)
        if options["wait"]
        else 0
    )


def _of_a_run(
    command: str, description: str, arguments: list[str], wait: bool
) -> tuple[str | None, dict[str, Any]]:
    parser = _run_parser(command, description)
    if wait:
        _add_wait(parser)
    wanted, rest = (
        (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else (None, arguments)
    )
    return wanted, parse_options(parser, _flags(rest))


def _run_parser(command: str, description: str) -> ArgumentParser:
    parser = command_parser(command, description)
    parser.add_argument(
        "--cluster",
        default=DEFAULT_CLUSTER,
        help="a cluster profile: its endpoint and namespace are the defaults",
    )
    add_connection_options(parser)
    return parser


def _add_wait(parser: ArgumentParser) -> None:
    parser.add_argument("--wait", type=bool, default=False, help="follow the run until it has ended")
    parser.add_argument("--poll", type=float, default=POLL, help="seconds between two looks at it")


def _flags(arguments: list[str]) -> list[str]:
    """`--wait` → `--wait=true`."""
    followers = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in ("--wait", "--follow") and following.startswith("--") else argument
        for argument, following in zip(arguments, followers, strict=False)
    ]


def _named(arguments: list[str], missing: str) -> tuple[str, list[str]]:
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
        raise UserError(f"{missing}.")
    return (
        (arguments[0], arguments[1:])
        if arguments[0] != "--help"
        else (next(iter(shipped_recipes())), arguments)
    )


def _followed(watch: Any, run_id: str) -> int:
    try:
        return watch()
    except KeyboardInterrupt:
        print(
            f"slam-asr: the run goes on in the cluster: `python -m pipelines status {run_id}` shows it",
            file=sys.stderr,
        )
        return 130


def _say(line: str) -> None:
    print(line, flush=True)
