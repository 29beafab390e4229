"""A run as people see it: what each step does, what it waits for, and why it failed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import kfp_server_api

from pipelines.cluster import Cluster
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.logs import waiting_pods
from slam_asr.notices.reasons import explain, explain_wait, waits_for, why_driver_failed
from slam_asr.notices.workflow import Node, Workflow
from slam_asr.progress import clock
from slam_asr.steps import STEPS, outputs_of

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States of a run that has ended."""


@dataclass
class RunStep:
    """One step of a run in Kubeflow; a step in a loop has one `RunStep` per iteration."""

    key: str
    """Identifies the step in the run, also among the iterations of a loop."""
    name: str
    state: str
    """not started, starting, waiting, running, succeeded, failed, stopped or never reached.

    Without a workflow, it may also be another state of the API v2beta1, in lower case, such as skipped.
    """
    started: datetime | None = None
    ended: datetime | None = None
    detail: str = ""
    """What the step waits for, why it failed or stopped, and which attempt this is; empty if none applies."""

    @property
    def seconds(self) -> float:
        """Duration so far, in seconds; 0 before the start."""
        if self.started is None:
            return 0.0
        return max(0.0, ((self.ended or datetime.now(UTC)) - self.started).total_seconds())

    def line(self) -> str:
        """Format the step for the terminal."""
        duration = f"  {clock(self.seconds)}" if self.started else ""
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.name:<20} {self.state:<10}{duration}{detail}"


def was_stopped(run: kfp_server_api.V2beta1Run) -> bool:
    """Whether somebody stopped the run; Kubeflow then reports it as FAILED."""
    return any(state.state in ("CANCELING", "CANCELED") for state in run.state_history or [])


def why_failed(run: kfp_server_api.V2beta1Run, workflow: Workflow | None, steps: list[RunStep]) -> str:
    """Return why a run failed, without a full stop; empty if that is unknown."""
    if was_stopped(run):
        return "somebody stopped it"
    for step in steps:
        if step.state == "failed" and step.detail:
            return step.detail
    if workflow is not None:
        for driver in workflow.failed_drivers():
            return why_driver_failed(driver, workflow.namespace, run.run_id)
    return _message(run.error)


def new_run_hint(run_id: str) -> str:
    """Return the command that starts another run like this one, and what it does, for messages."""
    return f"`python -m pipelines resume {run_id} --new` starts another one, which reuses finished results"


def broken_driver(workflow: Workflow) -> Node | None:
    """Return a driver whose failure a restart of the run would repeat; None if there is none.

    A driver that ran has recorded an execution with what it resolved, such as the pipeline root, even if it
    failed afterwards. A restart would record a second execution of the same name, and fail again because of
    it. A driver whose pod was never created has recorded nothing, and is not returned.
    """
    return next((node for node in workflow.failed_drivers() if node.phase == "Failed"), None)


def is_orphaned(run: kfp_server_api.V2beta1Run, workflow: Workflow | None) -> bool:
    """Whether the run's workflow was deleted from the cluster before Kubeflow saved it.

    Kubeflow shows such a run as unfinished. A workflow that was deleted later is not recognised.

    A workflow is saved within seconds of the run's creation, so only runs older than five minutes count.
    """
    age = (datetime.now(UTC) - run.created_at).total_seconds() if run.created_at else 0
    return workflow is not None and not workflow.name and run.state not in ENDED and age > 300


@dataclass
class RunView:
    """A run as it is now: its state, its workflow and its steps."""

    run: kfp_server_api.V2beta1Run
    workflow: Workflow | None
    steps: list[RunStep]

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.run.state in ENDED or is_orphaned(self.run, self.workflow)

    @property
    def state(self) -> str:
        """The run's state in words."""
        if is_orphaned(self.run, self.workflow):
            return "lost"
        if self.run.state in ENDED and was_stopped(self.run):
            return "stopped"
        return (self.run.state or "pending").lower()

    def failure(self) -> tuple[str, str]:
        """Return the names of the failed steps, and why the run failed, without a full stop.

        Each is empty if it is unknown; both are empty if the run succeeded or was stopped.
        """
        if self.state in ("succeeded", "stopped"):
            return "", ""
        if self.state == "lost":
            return "", "its workflow was deleted from the cluster"
        failed = dict.fromkeys(step.name for step in self.steps if step.state == "failed")
        return ", ".join(failed), why_failed(self.run, self.workflow, self.steps)

    def outcome(self, with_logs: bool = True) -> str:
        """Describe how the run ended, why, and what to do.

        Args:
            with_logs: whether to name the command that shows the logs.
        """
        run_id = self.run.run_id
        if self.state == "succeeded":
            return "the run succeeded"
        if self.state == "lost":
            return (
                "the run is lost: its workflow was deleted from the cluster, so Kubeflow shows it as "
                f"{(self.run.state or 'pending').lower()} for ever; {new_run_hint(run_id)}"
            )
        resume = f"`python -m pipelines resume {run_id}` restarts the steps that did not finish"
        if self.workflow is not None and broken_driver(self.workflow) is not None:
            resume = f"once this is mended, {new_run_hint(run_id)}"
        if self.state == "stopped":
            return f"somebody stopped the run; {resume}"
        failed, why = self.failure()
        where = f" in {failed}" if failed else ""
        cause = f": {why}" if why else ""
        # The reason may already name the command that shows the failed step's log.
        names_logs = "pipelines logs" in why or not with_logs
        logs = "" if names_logs else f"`python -m pipelines logs {run_id}` shows its logs, "
        return f"the run {self.state}{where}{cause}; {logs}{resume}"


def view(connection: Connection, run_id: str, cluster: Cluster) -> RunView:
    """Read a run with its workflow; ask Kubernetes why pods wait if the workflow gives no reason.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run_id: id of the run.
        cluster: the profile, for the number of attempts if the workflow does not contain it.

    Raises:
        NotFound: there is no such run.
        ClusterError: the API refuses, or temporary failures last for `patience()` seconds (see
            `Connection.call`).
    """
    run = connection.call("read the run", lambda: _complete(connection.runs.run_service_get_run(run_id)))
    workflow = connection.workflow(run_id)
    waiting: dict[str, str] = {}
    if workflow is not None and run.state not in ENDED:
        # Only the last attempt at a step can be waiting.
        pods = [nodes[-1] for nodes in workflow.attempts().values()]
        # Kubernetes is asked only if the workflow gives no reason: many users are not allowed to read pods.
        if any(pod.phase == "Pending" and not pod.reason for pod in pods):
            waiting = waiting_pods(workflow.namespace, run_id)
    if workflow is not None and workflow.nodes:
        steps = _steps_of_nodes(run, workflow, waiting, cluster)
    else:
        steps = _steps_of_tasks(run)
    order, latest = list(STEPS), datetime.max.replace(tzinfo=UTC)
    steps.sort(key=lambda step: (order.index(step.name), step.started or latest, step.key))
    return RunView(run, workflow, steps)


def follow(
    connection: Connection, run_id: str, cluster: Cluster, log_line: Callable[[str], None], interval: float
) -> RunView:
    """Log each change of a step's state or reason until the run has ended.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run_id: id of the run.
        cluster: the profile.
        log_line: called with each line.
        interval: seconds between two requests.

    Returns:
        The run after its end.

    Raises:
        ClusterError: the API refuses, or temporary failures last for `patience()` seconds (see
            `Connection.call`).
    """
    logged: dict[str, tuple[str, str]] = {}
    while True:
        current = view(connection, run_id, cluster)
        log_changes(current.steps, logged, log_line)
        if current.ended:
            log_line(current.outcome())
            return current
        time.sleep(interval)


def log_changes(
    steps: list[RunStep], logged: dict[str, tuple[str, str]], log_line: Callable[[str], None]
) -> None:
    """Log each step whose state or reason differs from the last one in `logged`, and update `logged`."""
    for step in steps:
        now = (step.state, step.detail)
        if logged.get(step.key) != now:
            logged[step.key] = now
            # Without this, the first look would log every step of the pipeline as not started.
            if step.state != "not started":
                log_line(step.line())


def _steps_of_nodes(
    run: kfp_server_api.V2beta1Run, workflow: Workflow, waiting: dict[str, str], cluster: Cluster
) -> list[RunStep]:
    """Return the pipeline's own steps, without the drivers and loops that Kubeflow adds.

    Args:
        run: the run, from the API v2beta1.
        workflow: its workflow.
        waiting: why pods have not started, in the words of Kubernetes, keyed by the name of their workflow
            node. The workflow itself does not show that Kueue holds a pod back.
        cluster: the profile, for the number of attempts if the workflow does not contain it.
    """
    steps = []
    for place, nodes in workflow.attempts().items():
        limit = workflow.max_attempts(place) or cluster.steps[nodes[-1].task].retries + 1
        steps.append(_step_of_attempts(run, workflow, place, nodes, waiting, limit))
    reached = {step.name for step in steps}
    state = "never reached" if run.state in ENDED else "not started"
    # Before a loop starts, the workflow has no nodes of its steps, so the names come from the pipeline.
    names = list(outputs_of(workflow.pipeline)) or sorted(workflow.omitted())
    return steps + [RunStep(name, name, state) for name in names if name not in reached]


def _step_of_attempts(
    run: kfp_server_api.V2beta1Run,
    workflow: Workflow,
    place: str,
    nodes: list[Node],
    waiting: dict[str, str],
    max_attempts: int,
) -> RunStep:
    """Return the state of one step.

    Args:
        run: the run.
        workflow: its workflow.
        place: identifies the step in the workflow.
        nodes: the pods of its attempts, in the order of their start; at least one.
        waiting: as for `_steps_of_nodes`.
        max_attempts: maximum number of attempts.
    """
    last = nodes[-1]
    step = RunStep(place, last.task, "running", last.started, last.ended)

    def why(node: Node) -> str:
        return explain(node.reason, node.task, workflow.namespace, run.run_id) if node.reason else ""

    if last.phase == "Succeeded":
        step.state = "succeeded"
    elif last.phase == "Pending":
        message = last.reason or waiting.get(last.name, "")
        step.state = "waiting" if waits_for(message) else "starting"
        if message:
            step.detail = explain_wait(message, last.task, workflow.namespace, run.run_id)
    elif last.phase in ("Failed", "Error"):
        if was_stopped(run):
            step.state, step.detail = "stopped", "somebody stopped the run"
        elif run.state in ENDED:
            step.state, step.detail = "failed", why(last)
        else:
            # Argo waits before the next attempt, or is about to give the step up.
            step.state, step.ended = "waiting", None
            step.detail = f"after a failure: {why(last)}" if why(last) else "after a failure"
    if len(nodes) > 1:
        cause = why(nodes[-2])
        retried = f"attempt {len(nodes)} of {max_attempts}" + (f", because {cause}" if cause else "")
        step.detail = f"{step.detail} ({retried})" if step.detail else f"({retried})"
    return step


def _steps_of_tasks(run: kfp_server_api.V2beta1Run) -> list[RunStep]:
    """Return the steps with the states of the API v2beta1, and its error messages as the only reasons."""
    details = (run.run_details.task_details if run.run_details else None) or []
    return [
        RunStep(
            d.task_id or d.display_name,
            d.display_name,
            _STATES.get(d.state or "", (d.state or "not started").lower()),
            d.start_time,
            # The API returns the year 1 for a step that has not ended.
            d.end_time if d.end_time and d.end_time.year > 1 else None,
            _message(d.error),
        )
        for d in details
        if d.display_name in STEPS
    ]


_STATES = {"PENDING": "not started", "RUNTIME_STATE_UNSPECIFIED": "not started", "CANCELED": "stopped"}
"""States of v2beta1 that have another name here."""


def _message(status: Any) -> str:
    text = getattr(status, "message", None) or ""
    return " ".join(text.split())[:300]


def _complete(run: Any) -> kfp_server_api.V2beta1Run:
    """Return a run, but raise ValueError if it has no id, so that `Connection.call` repeats the request.

    A response that was truncated may still be valid JSON.
    """
    if not getattr(run, "run_id", None):
        raise ValueError("the response was truncated")
    return run
