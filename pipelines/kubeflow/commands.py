"""The commands of `python -m pipelines` for runs in a cluster, such as `status`, `logs` and `resume`."""

import contextlib
import math
import os
import sys
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.cli import COMMANDS, command_parser
from pipelines.cluster import Cluster, load_cluster
from pipelines.compile import DEFAULT_CLUSTER
from pipelines.kubeflow.connection import Connection, ConnectionOptions, connect
from pipelines.processes import variables
from slam_asr.artifacts.costs import describe_costs
from slam_asr.artifacts.run_records import read_steps
from slam_asr.errors import ClusterError, ConfigurationError, UserError
from slam_asr.options import add_options, parse_options
from slam_asr.storage.client import TIMEOUT
from slam_asr.storage.retry import PATIENCE

if TYPE_CHECKING:
    import kfp_server_api

    from pipelines.kubeflow.run_view import RunView


@dataclass
class WaitOptions:
    """Options of the commands that can follow a run."""

    wait: bool = False
    """follow the run until it has ended"""
    poll: float = 5.0
    """with --wait: seconds between two requests for the run's state"""


@dataclass
class ListOptions:
    """Options of `runs`."""

    mine: bool = False
    """only runs that you submitted"""
    recipe: str = ""
    """only runs of this shipped recipe"""
    count: int = 10
    """maximum number of runs"""


@dataclass
class LogOptions:
    """Options of `logs`."""

    step: str | None = None
    """only the logs of this step"""
    all: bool = False
    """also the lines of Kubeflow and Argo and, without --step, the drivers' logs"""
    follow: bool = False
    """wait for more lines of each step that has started"""


@dataclass
class ResumeOptions:
    """Options of `resume`, besides those of waiting."""

    new: bool = False
    """start another run with the same version of the pipeline and the same parameters; it uses the cluster's
    present configuration, and reuses finished results"""


@dataclass
class Target:
    """The cluster that a command line names, and the run or schedule."""

    name: str
    """Name or id of the run or schedule; empty if the command line names none."""
    options: dict[str, Any]
    cluster: Cluster
    connection: Connection

    def run(self) -> "kfp_server_api.V2beta1Run":
        """Find the run in Kubeflow Pipelines."""
        from pipelines.kubeflow.runs import find

        return find(self.connection, self.name)


def runs(arguments: list[str]) -> int:
    """Print the latest runs, and return the exit code."""
    target = parse_target("runs", "List the latest runs.", arguments, ListOptions)
    options = target.options
    _print_runs(target.connection, options["count"], options["mine"], options["recipe"])
    return 0


def stop(arguments: list[str]) -> int:
    """Stop a run, and return the exit code."""
    target = parse_target("stop", "Stop a run; `resume` continues it later.", arguments)
    from pipelines.kubeflow.runs import stop as stop_run

    run = target.run()
    stop_run(target.connection, run)
    print(f"{run.display_name} is being stopped; `python -m pipelines resume {run.run_id}` continues it")
    return 0


def open_page(arguments: list[str]) -> int:
    """Print the address of a run's page, and return the exit code.

    In a terminal with a display, the page is also opened in a browser.
    """
    target = parse_target("open", "Open a run's page in the dashboard.", arguments)
    link = target.connection.link(target.run().run_id)
    print(link, flush=True)
    # In a terminal without a display, webbrowser may start a text browser, which takes over the terminal.
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.get("DISPLAY")):
        webbrowser.open(link)
    return 0


def status(arguments: list[str]) -> int:
    """Print a run's steps, or the latest runs, and return the exit code."""
    target = parse_target("status", "Show a run's steps, or the latest runs.", arguments, WaitOptions)
    connection, cluster = target.connection, target.cluster
    if not target.name:
        _print_runs(connection, 10)
        return 0
    from pipelines.kubeflow.run_view import view

    run_id = target.run().run_id
    now = view(connection, run_id, cluster)
    print(f"{now.run.display_name}: {now.state}\n{connection.link(run_id)}", flush=True)
    if target.options["wait"]:
        return follow_run(connection, run_id, cluster, target.options["poll"])
    for step in now.steps:
        print(step.line())
    if now.ended:
        print(now.outcome())
        _print_costs(now, cluster)
    return 0


def logs(arguments: list[str]) -> int:
    """Print the logs of a run's steps, and return the exit code."""
    description = "Show the logs of a run's steps, from the Kubernetes API or Argo's archive."
    target = parse_target("logs", description, arguments, LogOptions)
    from pipelines.kubeflow.logs import LogReader

    options, run_id = target.options, target.run().run_id
    with _watching(run_id):
        try:
            reader = LogReader(target.connection, run_id, everything=options["all"])
            reader.show(options["step"], options["follow"], _print_line)
        except ClusterError as error:
            reason = _reason_beside_logs(target, run_id)
            raise ClusterError(f"{error} In short, {reason}." if reason else str(error)) from None
        if reason := _reason_beside_logs(target, run_id):
            print(reason)
    return 0


def _reason_beside_logs(target: Target, run_id: str) -> str:
    """Return how a run ended, unless it succeeded or the program's log has the reason."""
    from pipelines.kubeflow.run_view import view

    now = view(target.connection, run_id, target.cluster)
    program_failed = f"pipelines logs {run_id} --step" in now.failure()[1]
    return "" if not now.ended or now.state == "succeeded" or program_failed else now.outcome(with_logs=False)


def resume(arguments: list[str]) -> int:
    """Restart a run's unfinished steps, or start another run like it, and return the exit code."""
    description = "Restart the unfinished steps of a failed or stopped run."
    target = parse_target("resume", description, arguments, WaitOptions, ResumeOptions)
    from pipelines.kubeflow.backend import launcher_changed_after
    from pipelines.kubeflow.runs import has_expired, retry, start_again

    connection, options = target.connection, target.options
    run = target.run()
    run_id = run.run_id
    if options["new"]:
        run_id, name = start_again(connection, run)
        print(f"run {run_id}: {name}\n{connection.link(run_id)}", flush=True)
    else:
        changed = launcher_changed_after(connection.namespace, run.created_at) if run.created_at else None
        retry(connection, run, connection.workflow(run_id), changed)
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
    return follow_run(connection, run_id, target.cluster, options["poll"], with_notice=True)


def parse_target(command: str, description: str, arguments: list[str], *own_options: type) -> Target:
    """Parse a command line, and connect to the cluster that it names.

    Args:
        command: the command.
        description: what the command does.
        arguments: the run or schedule, if the command takes one, and options.
        own_options: dataclasses of the command's own options.

    Raises:
        UserError: the name of the run or schedule is missing, an option is wrong, or the cluster does not
            answer.
    """
    parser = command_parser(command, description)
    parser.add_argument(
        "--cluster", default=DEFAULT_CLUSTER, help="cluster profile with the default endpoint and namespace"
    )
    for options_class in (ConnectionOptions, *own_options):
        add_options(parser, options_class)
    positional, name = COMMANDS[command].positionals, ""
    if positional and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        # An unset variable in a script gives an empty argument.
        if not name and positional not in _LISTED_BY:
            raise ConfigurationError(f"{positional.strip('[]')} is empty: give a value, or leave it out.")
    options = parse_options(parser, flags(arguments))
    if not name and positional in _LISTED_BY:
        raise ConfigurationError(
            f"{positional} is missing: {parser.prog} {positional}; {_LISTED_BY[positional]}."
        )
    if "poll" in options:
        require_seconds(options, "poll")
    cluster = load_cluster(options["cluster"])
    return Target(name, options, cluster, connect(options, cluster))


_LISTED_BY = {
    "RUN": "`python -m pipelines status` lists the latest",
    "NAME": "`schedule list` shows all",
}
"""For each required argument by position, the command that lists its values."""


def require_seconds(options: dict[str, Any], *names: str) -> None:
    """Check options that are numbers of seconds: `time.sleep` accepts neither negative nor infinite ones.

    Raises:
        ConfigurationError: one of them is negative, infinite or NaN.
    """
    for name in names:
        # A comparison with NaN is false as well.
        if not 0 <= options[name] < math.inf:
            raise ConfigurationError(f"--{name} is {options[name]:g}: give a number of seconds, 0 or more.")


def _print_runs(connection: Connection, count: int, mine: bool = False, recipe: str = "") -> None:
    """Print id, state and name of the latest runs; the arguments are those of `runs.latest`."""
    from pipelines.kubeflow.run_view import RunView
    from pipelines.kubeflow.runs import latest

    for run in latest(connection, count, mine, recipe):
        print(f"{run.run_id}  {RunView(run, None, []).state:<10} {run.display_name}")


_FLAGS = ("--wait", "--follow", "--mine", "--all", "--new", "--catch-up", "--run")
"""Options that are true if they have no value."""


def flags(arguments: list[str]) -> list[str]:
    """Give each flag without a value the value that the parser requires: `--wait` becomes `--wait=true`."""
    # Nothing follows the last argument. `--` stands in, so that a flag there counts as one without a value.
    followers = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in _FLAGS and following.startswith("-") else argument
        for argument, following in zip(arguments, followers, strict=False)
    ]


def follow_run(
    connection: Connection, run_id: str, cluster: Cluster, poll: float, with_notice: bool = False
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

    with _watching(run_id):
        run = follow(connection, run_id, cluster, _print_line, poll)
        _print_costs(run, cluster)
        if with_notice:
            send_if_missing(run, cluster, connection.link(run_id), _print_line)
    return 0 if run.state == "succeeded" else 1


@contextlib.contextmanager
def _watching(run_id: str) -> Iterator[None]:
    """Let Ctrl-C end only this program and not the run, which it watches within the block."""
    try:
        yield
    except KeyboardInterrupt:
        shown_by = f"`python -m pipelines status {run_id}` shows it"
        print(f"slam-asr: the run continues in the cluster: {shown_by}", file=sys.stderr)
        sys.exit(130)


def _print_costs(run: "RunView", cluster: Cluster) -> None:
    """Print the time and the costs of a run's steps, if its store can be read from here."""
    from pipelines.kubeflow.runs import parameters_of

    store = parameters_of(run.run).get("store")
    # The store may be reachable only inside the cluster, so this must not wait for long.
    limits = {name: "5" for name in (PATIENCE, TIMEOUT) if name not in os.environ}
    with variables(limits), contextlib.suppress(UserError):
        if store and (costs := describe_costs(read_steps(store, run.run.run_id), cluster.prices)):
            print(f"\n{costs}", flush=True)


def _print_line(line: str) -> None:
    print(line, flush=True)
