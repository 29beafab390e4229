"""Logs of a run's steps, from the Kubernetes API: Kubeflow Pipelines itself has none."""

from collections.abc import Callable
from typing import Any

import urllib3
from kubernetes import client as kubernetes
from kubernetes import config

from components import ALL_RESULTS
from slam_asr.errors import UserError

RUN_LABEL = "pipeline/runid"
STEP_LABEL = "app.kubernetes.io/component"
CONTAINER = "main"


def core_api() -> kubernetes.CoreV1Api:
    """The cluster's API, by the pod's own account or by the user's kubeconfig.

    Raises:
        UserError: there is neither.
    """
    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
        except (config.ConfigException, OSError) as error:
            raise UserError(
                f"The Kubernetes API is not known here ({' '.join(str(error).split()).rstrip('.')}): set KUBECONFIG, or read the logs in the dashboard."
            ) from None
    return kubernetes.CoreV1Api()


def show(
    api: kubernetes.CoreV1Api,
    namespace: str,
    run_id: str,
    step: str | None,
    follow: bool,
    hear: Callable[[str], None],
) -> None:
    """Pass on the lines of a run's steps, one pod after another.

    Args:
        api: the cluster's.
        namespace: the run's.
        run_id: the run's.
        step: only this one.
        follow: wait for more lines until a pod has ended.
        hear: takes each line.

    Raises:
        UserError: no right to read them, no such step, or no pods any more.
    """
    if step is not None and step not in ALL_RESULTS:
        raise UserError(f"There is no step {step}: --step may be {', '.join(ALL_RESULTS)}.")
    pods = ask(
        namespace,
        "list pods",
        lambda: api.list_namespaced_pod(namespace, label_selector=f"{RUN_LABEL}={run_id}"),
    ).items
    chosen = [
        pod
        for pod in pods
        if (pod.metadata.labels or {}).get(STEP_LABEL) in ([step] if step else ALL_RESULTS)
    ]
    if not chosen:
        which = f"of step {step} " if step else ""
        raise UserError(
            f"There are no pods {which}of the run {run_id} in {namespace}: they have not started, or were cleaned away since; the dashboard may have kept their logs."
        )
    for pod in sorted(
        chosen,
        key=lambda p: (p.metadata.creation_timestamp is None, p.metadata.creation_timestamp, p.metadata.name),
    ):
        labels, name = pod.metadata.labels, pod.metadata.name
        hear(f"── {labels[STEP_LABEL]} ({name}, {pod.status.phase.lower()})")
        if pod.status.phase == "Pending":
            hear(f"it waits: {_why(pod)}")
            continue
        answer = ask(
            namespace,
            "read logs",
            lambda name=name: api.read_namespaced_pod_log(
                name, namespace, container=CONTAINER, follow=follow, _preload_content=False
            ),
        )
        for line in _lines(answer):
            hear(line)


def ask(namespace: str, what: str, request: Callable[[], Any]) -> Any:
    """One request to the Kubernetes API, its refusal in a sentence.

    Raises:
        UserError: it was refused, or nothing answers.
    """
    try:
        return request()
    except kubernetes.ApiException as error:
        if error.status in (401, 403):
            raise UserError(
                f"You may not {what} in the namespace {namespace} ({error.status}): have somebody give you the role view there, or renew your login."
            ) from None
        raise UserError(
            f"The Kubernetes API does not {what} in {namespace} ({error.status} {error.reason})."
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise UserError(
            f"The Kubernetes API does not answer ({type(error).__name__}): check KUBECONFIG and your connection."
        ) from None


def _why(pod: Any) -> str:
    for condition in pod.status.conditions or []:
        if condition.status == "False" and condition.message:
            return condition.message
    return f"`kubectl describe pod {pod.metadata.name}` says why"


def _lines(answer: Any) -> Any:
    rest = b""
    for chunk in answer.stream(8192):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")
