"""`doctor --run`: start the pipeline of checks, follow it, and collect what its pods found."""

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipelines.cluster import Cluster
from pipelines.kubeflow.check_pipeline import CHECKED, NAME, write_package
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.logs import LogReader
from pipelines.kubeflow.run_view import ENDED, RunStep, RunView, log_changes, view, why_failed
from pipelines.kubeflow.runs import find, start, stop
from slam_asr.errors import UserError
from slam_asr.findings import BAD, UNKNOWN, Finding, parse_finding

_HOPELESS = ("for its image", "for its secret", "for its configuration")
"""Beginnings of `RunStep.detail` for a pod that cannot start before somebody acts. After `_GRACE` seconds,
the step is given up."""
_GRACE = 30.0
_HEADING = re.compile(r"── (\S+) \(")
"""The line before the log of each pod, as `LogReader` prints it."""


@dataclass(frozen=True)
class CheckRun:
    """The settings of a run of checks."""

    cluster: Cluster
    images: dict[str, str]
    nodes: int = 1
    """Number of pods of a TrainJob that must reach each other; with 1, no TrainJob is started."""
    patience: float = 600.0
    """Seconds for which a pod may wait to start before it is given up."""
    poll: float = 5.0
    """Seconds between two requests for the run's state."""

    def findings(self, connection: Connection, log_line: Callable[[str], None]) -> Iterator[Finding]:
        """Start the run, wait for its end, and yield what its pods found. Stop the run if it does not end.

        Args:
            connection: the connection to Kubeflow Pipelines.
            log_line: called with each line about the run's progress.

        Raises:
            UserError: the run cannot be started or followed.
        """
        with tempfile.TemporaryDirectory(prefix="slam-asr-") as folder:
            # The file is needed only until `start` has uploaded it.
            package = write_package(
                self.cluster, self.images, Path(folder) / f"{NAME}.yaml", connection.namespace, self.nodes
            )
            name = f"doctor {datetime.now().strftime('%m-%d %H:%M')}"
            run_id = start(connection, package, name, NAME, {}, self.cluster.service_account)
        log_line(f"run {run_id}: {name}\n{connection.link(run_id)}")
        try:
            # The findings are read before the run is stopped: stopping removes running pods with their logs.
            found = list(_findings(connection, self._wait(connection, run_id, log_line)))
        finally:
            _stop(connection, run_id, log_line)
        yield from found

    def _wait(self, connection: Connection, run_id: str, log_line: Callable[[str], None]) -> RunView:
        """Log each change of a step, until the run has ended or no step can start any more."""
        logged: dict[str, tuple[str, str]] = {}
        since: dict[str, float] = {}
        while True:
            current = view(connection, run_id, self.cluster)
            now = time.monotonic()
            log_changes(current.steps, logged, log_line)
            for step in current.steps:
                # The time counts from the last moment at which the step was not waiting.
                if step.state not in ("waiting", "starting", "not started"):
                    since.pop(step.name, None)
                else:
                    since.setdefault(step.name, now)
            ended = ("succeeded", "failed", "stopped", "never reached")
            unfinished = [step for step in current.steps if step.state not in ended]
            given_up = [s for s in unfinished if now - since.get(s.name, now) >= self._limit(s)]
            # The run is given up only if all unfinished steps are: the findings of a step that runs are
            # worth waiting for.
            if current.ended or (unfinished and len(given_up) == len(unfinished)):
                return current
            time.sleep(self.poll)

    def _limit(self, step: RunStep) -> float:
        """Return the seconds for which a step may wait."""
        return min(_GRACE, self.patience) if step.detail.startswith(_HOPELESS) else self.patience


def _stop(connection: Connection, run_id: str, log_line: Callable[[str], None]) -> None:
    """Stop the run if it has not ended."""
    try:
        run = find(connection, run_id)
        if run.state not in ENDED:
            stop(connection, run)
    except UserError as error:
        log_line(f"{error} The run may still be active: `python -m pipelines stop {run_id}` stops it.")


def _findings(connection: Connection, last: RunView) -> Iterator[Finding]:
    run_id = last.run.run_id
    found: dict[str, list[Finding]] = defaultdict(list)
    unreadable = ""
    if any(step.started for step in last.steps):
        try:
            found = _read_logs(connection, run_id)
        except UserError as error:
            unreadable = str(error)
    for step in last.steps:
        yield from (Finding(f.sign, f"{step.name}: {f.subject}", f.detail) for f in found[step.name])
        subject = f"{step.name}: pod"
        if step.state == "waiting":
            yield Finding(BAD, subject, f"did not start: it waits {step.detail}")
        elif step.state in ("starting", "not started"):
            yield Finding(BAD, subject, f"did not start: {step.detail or 'the reason is not known'}")
        elif step.state == "failed":
            yield Finding(BAD, subject, step.detail or "failed, for an unknown reason")
        elif step.state == "succeeded" and not found[step.name]:
            page = connection.link(run_id)
            reason = unreadable or "its log has none."
            yield Finding(UNKNOWN, subject, f"its findings are only in the dashboard, at {page}: {reason}")
        elif step.state not in ("succeeded", "never reached"):
            yield Finding(BAD, subject, f"did not end: it is {step.state}")
    if all(step.state in ("never reached", "not started") for step in last.steps):
        why = why_failed(last.run, last.workflow, last.steps)
        yield Finding(BAD, "run", f"started no pod: {why or f'its state is {last.state}'}")


def _read_logs(connection: Connection, run_id: str) -> dict[str, list[Finding]]:
    """Return the findings in the logs of the run's pods, keyed by step."""
    found: dict[str, list[Finding]] = defaultdict(list)
    step = ""

    def read(line: str) -> None:
        nonlocal step
        if heading := _HEADING.match(line):
            step = heading[1]
        elif step in CHECKED and (finding := parse_finding(line)):
            found[step].append(finding)

    # The findings are lines of the logs, because a step's outputs can be read only after it has succeeded.
    LogReader(connection, run_id).show(None, False, read)
    return found
