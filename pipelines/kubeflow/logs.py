"""Read the logs of a run's steps from the Kubernetes API: the API of Kubeflow Pipelines provides none."""

from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from kubernetes import client as kubernetes
from kubernetes import config

from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.steps import STEPS

RUN_LABEL = "pipeline/runid"
"""Label of a pod with the id of its run; Kubeflow sets it."""
STEP_LABEL = "app.kubernetes.io/component"
"""Label of a pod with the name of its step; `pipelines.placement.labels` sets it."""
CONTAINER = "main"
"""Container of a pod that runs the step."""


def core_api() -> kubernetes.CoreV1Api:
    """Return a client for the Kubernetes API, with the pod's own account or the user's kubeconfig.

    Raises:
        ClusterError: neither exists.
    """
    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except (config.ConfigException, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ClusterError(
                f"No access to the Kubernetes API is configured ({reason}): set KUBECONFIG, "
                "or read the logs in the dashboard."
            ) from None
    return kubernetes.CoreV1Api()


def show(
    api: kubernetes.CoreV1Api,
    namespace: str,
    run_id: str,
    step: str | None,
    follow: bool,
    on_line: Callable[[str], None],
) -> None:
    """Print the logs of a run's steps, one pod after another.

    Args:
        api: client of the cluster.
        namespace: namespace of the run.
        run_id: id of the run.
        step: name of the only step to print; None for all steps.
        follow: wait for more lines until each pod has ended.
        on_line: called with each line.

    Raises:
        ConfigurationError: there is no such step.
        ClusterError: permission is missing, the API does not answer, or the run has no pods, perhaps because
            they were deleted.
    """
    if step is not None and step not in STEPS:
        raise ConfigurationError(f"There is no step {step}: --step may be {', '.join(STEPS)}.")
    pods = call_kubernetes(
        namespace,
        "list pods",
        lambda: api.list_namespaced_pod(namespace, label_selector=f"{RUN_LABEL}={run_id}"),
    ).items
    selected = [
        pod for pod in pods if (pod.metadata.labels or {}).get(STEP_LABEL) in ([step] if step else STEPS)
    ]
    if not selected:
        which = f"of step {step} " if step else ""
        raise ClusterError(
            f"There are no pods {which}of the run {run_id} in {namespace}: they have not started yet, or "
            "were deleted; the dashboard may still have their logs."
        )
    # Pods without a creation time come last: the first item avoids a comparison of None with a time.
    for pod in sorted(
        selected,
        key=lambda p: (p.metadata.creation_timestamp is None, p.metadata.creation_timestamp, p.metadata.name),
    ):
        labels, name = pod.metadata.labels, pod.metadata.name
        on_line(f"── {labels[STEP_LABEL]} ({name}, {pod.status.phase.lower()})")
        if pod.status.phase == "Pending":
            on_line(f"waiting: {_reason_to_wait(pod)}")
            continue
        for line in _lines(_open_log(api, namespace, name, follow)):
            on_line(line)


def _open_log(api: kubernetes.CoreV1Api, namespace: str, pod: str, follow: bool) -> Any:
    def request() -> Any:
        # Without preloading, the client returns a stream instead of waiting for the complete log.
        return api.read_namespaced_pod_log(
            pod, namespace, container=CONTAINER, follow=follow, _preload_content=False
        )

    return call_kubernetes(namespace, "read logs", request)


def call_kubernetes(namespace: str, what: str, request: Callable[[], Any]) -> Any:
    """Send a request to the Kubernetes API and return its answer.

    Args:
        namespace: namespace of the request, for messages.
        what: the request as a verb and its object, for messages.
        request: sends the request.

    Raises:
        ClusterError: the API refuses the request, or does not answer.
    """
    try:
        return request()
    except kubernetes.ApiException as error:
        if error.status in (401, 403):
            raise ClusterError(
                f"You may not {what} in the namespace {namespace} ({error.status}): ask for the role `view` "
                "there, or renew your login."
            ) from None
        raise ClusterError(
            f"The Kubernetes API could not {what} in {namespace} ({error.status} {error.reason})."
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise ClusterError(
            f"The Kubernetes API does not answer ({type(error).__name__}): "
            "check KUBECONFIG and your connection."
        ) from None


def _reason_to_wait(pod: Any) -> str:
    for condition in pod.status.conditions or []:
        if condition.status == "False" and condition.message:
            return condition.message
    return f"`kubectl describe pod {pod.metadata.name}` shows why"


def _lines(answer: Any) -> Iterator[str]:
    # A chunk may end within a line, or within a UTF-8 character, so only complete lines are decoded.
    rest = b""
    for chunk in answer.stream(8192):
        *complete, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in complete)
    if rest:
        yield rest.decode("utf-8", "replace")
