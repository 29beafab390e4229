"""The commands of `python -m pipelines` for runs in a cluster, such as `status`, `logs` and `resume`."""

import contextlib
import os
import sys
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster
from pipelines.compile import DEFAULT_CLUSTER
from pipelines.kubeflow.connection import add_connection_options, connect, require_seconds
from slam_asr.artifacts.costs import describe_costs
from slam_asr.artifacts.run_records import read_steps
from slam_asr.config.recipe import shipped_recipes
from slam_asr.errors import ClusterError, ConfigurationError, UserError
from slam_asr.options import parse_options
from slam_asr.storage.client import TIMEOUT
from slam_asr.storage.retry import PATIENCE

if TYPE_CHECKING:
    import kfp_server_api

    from pipelines.kubeflow.connection import Connection
    from pipelines.kubeflow.run_view import RunView

POLL = 5.0
"""Default number of seconds between two requests while following a run."""


def runs(arguments: list[str]) -> int:
    """Print the latest runs, and return the exit code."""
    parser = run_parser("runs", "List the latest runs.")
    parser.add_argument("--mine", type=bool, default=False, help="only runs that you submitted")
    parser.add_argument("--recipe", type=str, default="", help="only runs of this shipped recipe")
    parser.add_argument("--count", type=int, default=10, help="maximum number of runs")
    options = parse_options(parser, flags(arguments))
    from pipelines.kubeflow.runs import latest

    connection = connect(options, load_cluster(options["cluster"]))
    for run in latest(connection, options["count"], options["mine"], options["recipe"]):
        print(_run_line(run))
    return 0


def stop(arguments: list[str]) -> int:
    """Stop a run, and return the exit code."""
    run_key, options = _parse(run_parser("stop", "Stop a run; `resume` continues it later."), arguments)
    run_key = _required(run_key, "stop")
    from pipelines.kubeflow.runs import find
    from pipelines.kubeflow.runs import stop as stop_run

    connection = connect(options, load_cluster(options["cluster"]))
    run = find(connection, run_key)
    stop_run(connection, run)
    print(f"{run.display_name} is being stopped; `python -m pipelines resume {run.run_id}` continues it")
    return 0


def open_page(arguments: list[str]) -> int:
    """Print the address of a run's page, and return the exit code.

    In a terminal with a display, the page is also opened in a browser.
    """
    run_key, options = _parse(run_parser("open", "Open a run's page in the dashboard."), arguments)
    run_key = _required(run_key, "open")
    from pipelines.kubeflow.runs import find

    connection = connect(options, load_cluster(options["cluster"]))
    link = connection.link(find(connection, run_key).run_id)
    print(link, flush=True)
    # In a terminal without a display, webbrowser may start a text browser, which takes over the terminal.
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.get("DISPLAY")):
        webbrowser.open(link)
    return 0


def status(arguments: list[str]) -> int:
    """Print a run's steps, or the latest runs, and return the exit code."""
    parser = run_parser("status", "Show a run's steps, or the latest runs.")
    add_wait(parser)
    run_key, options = _parse(parser, arguments)
    from pipelines.kubeflow.run_view import view
    from pipelines.kubeflow.runs import find, latest

    cluster = load_cluster(options["cluster"])
    connection = connect(options, cluster)
    if run_key is None:
        for run in latest(connection, 10):
            print(_run_line(run))
        return 0
    run_id = find(connection, run_key).run_id
    now = view(connection, run_id, cluster)
    print(f"{now.run.display_name}: {now.state}\n{connection.link(run_id)}", flush=True)
    if options["wait"]:
        return follow_run(connection, run_id, cluster, options["poll"])
    for step in now.steps:
        print(step.line())
    if now.ended:
        print(now.outcome())
        _print_costs(now, cluster)
    return 0


def logs(arguments: list[str]) -> int:
    """Print the logs of a run's steps, and return the exit code."""
    parser = run_parser("logs", "Show the logs of a run's steps, from the Kubernetes API or Argo's archive.")
    parser.add_argument("--step", type=str, help="only the logs of this step")
    parser.add_argument(
        "--all",
        type=bool,
        default=False,
        help="also the lines of Kubeflow and Argo and, without --step, the drivers' logs",
    )
    parser.add_argument(
        "--follow", type=bool, default=False, help="wait for more lines of each step that has started"
    )
    run_key, rest = positional(
        arguments,
        "RUN is missing: python -m pipelines logs RUN; `python -m pipelines status` lists the latest",
    )
    options = parse_options(parser, flags(rest))
    from pipelines.kubeflow.logs import LogReader
    from pipelines.kubeflow.runs import find

    cluster = load_cluster(options["cluster"])
    connection = connect(options, cluster)
    run = find(connection, run_key)

    def print_logs() -> int:
        reader = LogReader(connection, run.run_id, everything=options["all"])
        try:
            reader.show(options["step"], options["follow"], _print_line)
        except ClusterError as error:
            reason = _reason_beside_logs(connection, run.run_id, cluster)
            raise ClusterError(f"{error} In short, {reason}." if reason else str(error)) from None
        if reason := _reason_beside_logs(connection, run.run_id, cluster):
            print(reason)
        return 0

    return _watch(print_logs, run.run_id)


def _reason_beside_logs(connection: "Connection", run_id: str, cluster: Cluster) -> str:
    """Return how a run ended, unless it succeeded or the program's log has the reason."""
    from pipelines.kubeflow.run_view import view

    now = view(connection, run_id, cluster)
    program_failed = f"pipelines logs {run_id} --step" in now.failure()[1]
    return "" if not now.ended or now.state == "succeeded" or program_failed else now.outcome(with_logs=False)


def resume(arguments: list[str]) -> int:
    """Restart a run's unfinished steps, or start another run like it, and return the exit code."""
    parser = run_parser("resume", "Restart the unfinished steps of a failed or stopped run.")
    add_wait(parser)
    parser.add_argument(
        "--new",
        type=bool,
        default=False,
        help="start another run with the same version of the pipeline and the same parameters; it uses the "
        "cluster's present configuration, and reuses finished results",
    )
    run_key, options = _parse(parser, arguments)
    run_key = _required(run_key, "resume")
    from pipelines.kubeflow.backend import launcher_changed_after
    from pipelines.kubeflow.runs import find, has_expired, retry, start_again
    from pipelines.kubeflow.workflow import read_workflow

    cluster = load_cluster(options["cluster"])
    connection = connect(options, cluster)
    run = find(connection, run_key)
    run_id = run.run_id
    if options["new"]:
        run_id, name = start_again(connection, run)
        print(f"run {run_id}: {name}\n{connection.link(run_id)}", flush=True)
    else:
        changed = launcher_changed_after(connection.namespace, run.created_at) if run.created_at else None
        retry(connection, run, read_workflow(connection, run_id), changed)
        print(f"{run.display_name} was restarted\n{connection.link(run_id)}", flush=True)
        if has_expired(run):
            print(
                "it ended more than an hour ago, and Argo deletes a workflow with its pods after an hour: "
                "Kubeflow creates the workflow again from its own copy, and `logs` reads earlier attempts "
                "from Argo's archive"
            )
        if changed is not False:
            since = ", and kfp-launcher has changed since" if changed else ""
            print(
                "it still uses the pipeline root and the credentials that kfp-launcher named when the run "
                f"began{since}: `python -m pipelines resume {run_id} --new` starts another run with the "
                "present ones"
            )
    if not options["wait"]:
        return 0
    return follow_run(connection, run_id, cluster, options["poll"], with_notice=True)


def _parse(parser: ArgumentParser, arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Parse `[RUN] [--option …]`: return the run's id or name, if given, and the options."""
    has_run = bool(arguments) and not arguments[0].startswith("-")
    run_key, rest = (arguments[0], arguments[1:]) if has_run else (None, arguments)
    options = parse_options(parser, flags(rest))
    if "poll" in options:
        require_seconds(options, "poll")
    return run_key, options


def _required(run_key: str | None, command: str) -> str:
    """Return the run's id or name.

    Raises:
        ConfigurationError: none was given.
    """
    if run_key is None:
        raise ConfigurationError(
            f"RUN is missing: python -m pipelines {command} RUN; `python -m pipelines status` lists the "
            "latest."
        )
    return run_key


def _run_line(run: "kfp_server_api.V2beta1Run") -> str:
    """Format a run for a list: id, state and name."""
    from pipelines.kubeflow.run_view import ENDED, was_stopped

    stopped = run.state in ENDED and was_stopped(run)
    state = "stopped" if stopped else (run.state or "PENDING").lower()
    return f"{run.run_id}  {state:<10} {run.display_name}"


def run_parser(command: str, description: str) -> ArgumentParser:
    """Return a parser for a command that only needs to connect to Kubeflow Pipelines."""
    parser = command_parser(command, description)
    parser.add_argument(
        "--cluster",
        default=DEFAULT_CLUSTER,
        help="cluster profile with the default endpoint and namespace",
    )
    add_connection_options(parser)
    return parser


def add_wait(parser: ArgumentParser) -> None:
    """Add to a parser the options for following a run."""
    parser.add_argument("--wait", type=bool, default=False, help="follow the run until it has ended")
    parser.add_argument(
        "--poll",
        type=float,
        default=POLL,
        help="with --wait: seconds between two requests for the run's state",
    )


def flags(arguments: list[str]) -> list[str]:
    """Give each flag without a value the value that the parser requires: `--wait` becomes `--wait=true`."""
    # Nothing follows the last argument. `--` stands in, so that a flag there counts as one without a value.
    followers = [*arguments[1:], "--"]
    return [
        f"{argument}=true"
        if argument in ("--wait", "--follow", "--mine", "--all", "--new", "--catch-up")
        and following.startswith("--")
        else argument
        for argument, following in zip(arguments, followers, strict=False)
    ]


def positional(arguments: list[str], missing: str) -> tuple[str, list[str]]:
    """Split off the required first argument.

    Args:
        arguments: all arguments after the command's name.
        missing: the error message if there is none, without its full stop.

    Returns:
        The first argument, and the others. If the first one is `--help`, a shipped recipe takes its place,
        because the parser that prints the help cannot be built without a recipe.

    Raises:
        ConfigurationError: the argument is missing.
    """
    if arguments and arguments[0] == "--help":
        return next(iter(shipped_recipes())), arguments
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError(f"{missing}.")
    return arguments[0], arguments[1:]


def follow_run(
    connection: "Connection", run_id: str, cluster: Cluster, poll: float, with_notice: bool = False
) -> int:
    """Follow a run until it has ended, and return the exit code.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run_id: id of the run.
        cluster: the profile.
        poll: seconds between two requests.
        with_notice: send the notice that the profile requests, if the run could not send it itself.
    """
    from pipelines.kubeflow.run_view import follow
    from pipelines.notice import send_if_missing

    def watch() -> int:
        run = follow(connection, run_id, cluster, _print_line, poll)
        _print_costs(run, cluster)
        if with_notice:
            send_if_missing(run, cluster, connection.link(run_id), _print_line)
        return 0 if run.state == "succeeded" else 1

    return _watch(watch, run_id)


def _watch(watch: Callable[[], int], run_id: str) -> int:
    """Call `watch` and return its exit code; Ctrl-C ends only the watching, not the run."""
    try:
        return watch()
    except KeyboardInterrupt:
        print(
            f"slam-asr: the run continues in the cluster: `python -m pipelines status {run_id}` shows it",
            file=sys.stderr,
        )
        return 130


def _print_costs(run: "RunView", cluster: Cluster) -> None:
    """Print the time and the costs of a run's steps, if its store can be read from here."""
    settings = run.run.runtime_config
    store = ((settings and settings.parameters) or {}).get("store")
    # The store may be reachable only inside the cluster, so this must not wait for long.
    limits = {name: "5" for name in (PATIENCE, TIMEOUT) if name not in os.environ}
    os.environ.update(limits)
    try:
        with contextlib.suppress(UserError):
            if store and (costs := describe_costs(read_steps(store, run.run.run_id), cluster.prices)):
                print(f"\n{costs}", flush=True)
    finally:
        for name in limits:
            del os.environ[name]


def _print_line(line: str) -> None:
    print(line, flush=True)
