"""Finds out why nodes of a TrainJob do not run yet, in the words of the scheduler, Kubernetes or Kueue.

The job's status does not give the reason: with one of two pods pending, it has no condition. The SDK does not
give it either: it drops the scheduler's events, which have no `first_timestamp`, and the events of a Job that
cannot create a pod.
"""

from datetime import datetime
from typing import Any

from kubernetes.client import CoreV1Event, V1Pod

_STARTING = ("ContainerCreating", "PodInitializing")
"""The reasons that Kubernetes gives for every container while its pod starts."""
_OF_THE_JOB = ("TrainJob", "JobSet", "Job", "Workload")
"""Kinds of objects whose events say why a node has no pod; Workload is Kueue's."""


def waiting_nodes(
    core_api: Any, namespace: str, job: str, nodes: int, created: datetime
) -> dict[str, list[str]]:
    """Return the nodes that do not run yet, keyed by the reason.

    Args:
        core_api: client of the Kubernetes API.
        namespace: namespace of the job.
        job: name of the TrainJob.
        nodes: number of the job's nodes.
        created: time at which the job was created. Older events belong to an earlier job of the same name.

    Returns:
        The names of the nodes, such as `node-1`, keyed by the reason.

    Raises:
        ApiException: the API refuses a request.
        HTTPError: the API does not answer.
    """
    selector = f"jobset.sigs.k8s.io/jobset-name={job},jobset.sigs.k8s.io/replicatedjob-name=node"
    latest: dict[str, V1Pod] = {}
    pods = core_api.list_namespaced_pod(namespace, label_selector=selector).items
    for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
        # The pods are in the order of their creation, so the newest pod of each node remains.
        latest[pod.metadata.labels["batch.kubernetes.io/job-completion-index"]] = pod
    events = [e for e in core_api.list_namespaced_event(namespace).items if _time(e) >= created]
    waiting: dict[str, list[str]] = {}
    for number in range(nodes):
        waiting_pod = latest.get(str(number))
        if waiting_pod is None:
            reason = _why_no_pod(job, events)
        elif waiting_pod.status.phase == "Pending":
            reason = _why_pending(waiting_pod, events)
        else:
            continue
        waiting.setdefault(reason, []).append(f"node-{number}")
    return waiting


def _why_no_pod(job: str, events: list[CoreV1Event]) -> str:
    """Return the latest warning about the TrainJob, its JobSet, its Job, or its Workload in Kueue."""
    # The JobSet has the TrainJob's name. Its Job's name adds `-node-0`, and the Workload's name begins with
    # `trainjob-`.
    related = [
        event
        for event in events
        if event.involved_object.kind in _OF_THE_JOB
        and (event.involved_object.name or "").removeprefix("trainjob-").startswith(job)
    ]
    return _latest_warning(related) or "it has no pod yet"


def why_pending(pod: V1Pod) -> str:
    """Return why a pod is pending: the reason of its condition, or of a container; empty if neither is known.

    Every pod passes through the states `ContainerCreating` and `PodInitializing`, so they are returned only
    if no container has another reason.
    """
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return _sentence(condition.reason or "Unschedulable", condition.message)
    starting = ""
    for container in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        state = container.state and container.state.waiting
        if state and state.reason in (None, *_STARTING):
            starting = state.reason or _STARTING[0]
        elif state:
            return _sentence(state.reason, state.message)
    return starting


def _why_pending(pod: V1Pod, events: list[CoreV1Event]) -> str:
    """Return why a pod is pending; if it only starts, its latest warning comes first."""
    reason = why_pending(pod)
    if reason not in ("", *_STARTING):
        return reason
    own = [
        e for e in events if e.involved_object.kind == "Pod" and e.involved_object.name == pod.metadata.name
    ]
    return _latest_warning(own) or reason or "Pending"


def _latest_warning(events: list[CoreV1Event]) -> str:
    # Kueue's event about a Workload that waits for quota is not a warning; its reason is Pending.
    reasons = [e for e in events if e.type == "Warning" or e.reason == "Pending"]
    if not reasons:
        return ""
    event = max(reasons, key=_time)
    return _sentence(event.reason, event.message)


def _time(event: CoreV1Event) -> datetime:
    """Return the time of an event. Components that report events fill different fields."""
    times = (event.last_timestamp, event.event_time, event.first_timestamp)
    return next((time for time in times if time), event.metadata.creation_timestamp)


def _sentence(reason: str | None, message: str | None) -> str:
    return ": ".join(" ".join(part.split()) for part in (reason, message) if part)
