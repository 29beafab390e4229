"""Reads the logs of a run's steps from the Kubernetes API, or else from Argo's archive."""

import functools
import re
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from kubernetes import client as kubernetes

from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.kubernetes_api import UNREADABLE, call_kubernetes, core_api
from pipelines.processes import decoded_lines
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.notices.reasons import explain_wait, waits_for
from slam_asr.steps import STEPS
from slam_asr.trainjob.waiting import why_pending

RUN_LABEL = "pipeline/runid"
"""Label of a pod with the id of its run; Kubeflow sets it."""
STEP_LABEL = "app.kubernetes.io/component"
"""Label of a pod with the name of its step; `pipelines.placement.labels` sets it."""
_NODE_NAME = "workflows.argoproj.io/node-name"
"""Annotation of a pod with the name of its node in the workflow; Argo sets it."""
_QUICK_TIMEOUT = 5.0
"""Timeout in seconds of `waiting_pods`, whose answer only adds a reason to a run's state."""
CONTAINER = "main"
"""Container of a pod that runs the step."""
_MAX_FRAMEWORK_LINES = 200
"""How many of the last lines of Kubeflow and Argo are shown if the program never started."""
_FRAMEWORK_LINE = re.compile(
    r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.]+:\d+\]"  # Kubeflow's launcher
    r"|time=\S+ level=\w+ msg=.*\bargo="  # Argo up to 3
    r"|\{.*\"argo\": ?true"  # Argo 4
    r"|\[KFP Executor "  # kfp in the step's Python
)


class LogReader:
    """Reads the logs of a run's pods from the Kubernetes API, or else from Argo's archive.

    The archive has the logs of deleted pods, and of pods that the user is not allowed to read. The API of
    Kubeflow Pipelines itself provides no logs.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run_id: id of the run.
        everything: also show the lines of Kubeflow and Argo and, if `show` is called without a step, the
            logs of drivers whose pods still exist.
    """

    def __init__(self, connection: Connection, run_id: str, everything: bool = False) -> None:
        self.connection, self.run_id, self.everything = connection, run_id, everything
        self.namespace = connection.namespace

    def show(self, step: str | None, follow: bool, on_line: Callable[[str], None]) -> None:
        """Print the logs of the run's steps, one pod after another.

        Args:
            step: name of the only step to print; None for all steps.
            follow: for each pod that has started, wait for more lines until it has ended.
            on_line: called with each line.

        Raises:
            ConfigurationError: there is no such step.
            ClusterError: no log can be read, because permission is missing, the API does not answer, no pod
                exists yet, or all were deleted.
        """
        if step is not None and step not in STEPS:
            raise ConfigurationError(f"There is no step {step}: --step may be {', '.join(STEPS)}.")
        unavailable = ""
        shown: set[str] = set()
        try:
            # This raises if no access is configured; the archive may still have the logs.
            api = core_api()
            for pod in self._pods(api, step):
                self._show_pod(api, pod, follow, on_line)
                shown.add(pod.metadata.name)
        except ClusterError as error:
            # A user who is not allowed to read pods can still read the archive, through the dashboard.
            unavailable = str(error)
        archived = self._show_archived(step, shown, on_line)
        if not archived and (unavailable or not shown):
            which = f" for step {step}" if step else ""
            raise ClusterError(
                unavailable
                or f"Run {self.run_id} has no pods{which} in namespace {self.namespace}: they have not "
                "started yet, or were deleted; the dashboard may still have their logs."
            )

    def _pods(self, api: kubernetes.CoreV1Api, step: str | None) -> list[Any]:
        """Return the pods of the steps, in the order of their creation."""
        selector, steps = f"{RUN_LABEL}={self.run_id}", [step] if step else list(STEPS)
        request = functools.partial(api.list_namespaced_pod, self.namespace, label_selector=selector)
        selected = [
            pod
            for pod in call_kubernetes(self.namespace, "list pods", request).items
            if (pod.metadata.labels or {}).get(STEP_LABEL) in steps or (self.everything and not step)
        ]
        # Pods without a creation time come last.
        latest = datetime.max.replace(tzinfo=UTC)
        return sorted(selected, key=lambda p: (p.metadata.creation_timestamp or latest, p.metadata.name))

    def _show_pod(
        self, api: kubernetes.CoreV1Api, pod: Any, follow: bool, on_line: Callable[[str], None]
    ) -> None:
        name = pod.metadata.name
        step = (pod.metadata.labels or {}).get(STEP_LABEL, "driver")
        on_line(f"── {step} ({name}, {pod.status.phase.lower()})")
        if pod.status.phase == "Pending":
            message = why_pending(pod)
            reason = explain_wait(message, step, self.namespace, self.run_id)
            colon = "" if waits_for(message) else ":"
            on_line(f"waiting{colon} {reason or f'`kubectl describe pod {name}` shows why'}")
            return

        request = functools.partial(
            api.read_namespaced_pod_log, name, self.namespace, container=CONTAINER, follow=follow
        )
        # Without preloading, the client returns a stream instead of waiting for the complete log.
        log = call_kubernetes(self.namespace, "read logs", lambda: request(_preload_content=False))
        self._print(decoded_lines(log.stream(8192)), on_line)

    def _show_archived(self, step: str | None, shown: set[str], on_line: Callable[[str], None]) -> bool:
        """Print the archived logs of all ended pods except those in `shown`; return whether any exist."""
        workflow = self.connection.workflow(self.run_id)
        if workflow is None:
            return False
        found = False
        for nodes in workflow.attempts().values():
            for node in nodes:
                pod, place = workflow.pod_name(node), workflow.archived_log(node)
                # Argo archives a log when its pod ends.
                if pod in shown or place is None or step not in (None, node.task) or node.ended is None:
                    continue
                on_line(f"── {node.task} ({pod}, from Argo's archive)")
                content = self.connection.artifact(*place)
                if content is None:
                    on_line(f"not readable through the dashboard: s3://{'/'.join(place)}")
                else:
                    self._print(decoded_lines([content]), on_line)
                found = True
        return found

    def _print(self, lines: Iterator[str], on_line: Callable[[str], None]) -> None:
        """Print the program's own lines; if the program never started, those of Kubeflow and Argo instead."""
        others: deque[str] = deque(maxlen=_MAX_FRAMEWORK_LINES)
        any_of_program = False
        for is_of_program, line in _classified(lines):
            if is_of_program or self.everything:
                any_of_program = True
                on_line(line)
            else:
                others.append(line)
        if not any_of_program:
            for line in others:
                on_line(line)


def _classified(lines: Iterator[str]) -> Iterator[tuple[bool, str]]:
    """Yield (whether the program wrote it, line); Argo, Kubeflow's launcher and kfp write the others."""
    in_json = False
    for line in lines:
        if in_json:
            # The launcher prints its input and output as indented JSON after a line that ends with a brace.
            in_json = line not in ("}", "} ")
            yield False, line
        elif _FRAMEWORK_LINE.match(line):
            in_json = line.rstrip().endswith("{")
            yield False, line
        else:
            yield True, line


def waiting_pods(namespace: str, run_id: str) -> dict[str, str]:
    """Return why pods of a run have not started, in the words of Kubernetes.

    Args:
        namespace: namespace of the run.
        run_id: id of the run.

    Returns:
        A message for each waiting pod, keyed by the name of its node in the workflow. Without access to the
        Kubernetes API it is empty, and only Kubeflow's own states are known.
    """
    selector = f"{RUN_LABEL}={run_id}"
    try:
        pods = core_api().list_namespaced_pod(
            namespace, label_selector=selector, _request_timeout=_QUICK_TIMEOUT
        )
    except UNREADABLE:
        return {}
    return {
        (pod.metadata.annotations or {}).get(_NODE_NAME, ""): message
        for pod in pods.items
        if pod.status.phase == "Pending" and (message := why_pending(pod))
    }
