"""The nodes of a cluster: whether the profile's steps with GPUs fit on them, and which images they have."""

from typing import Any

import urllib3
from kubernetes import client as kubernetes

from pipelines.cluster import Cluster, StepSettings
from pipelines.kubeflow.namespace import Result
from slam_asr.findings import BAD, GOOD
from slam_asr.steps import STEPS


def loaded_images(api: kubernetes.CoreV1Api) -> list[str] | None:
    """Return the names of images that the nodes have; None if the nodes cannot be listed.

    Kubernetes lists only the 50 largest images of each node.
    """
    try:
        nodes = api.list_node().items
    except (kubernetes.ApiException, urllib3.exceptions.HTTPError):
        return None
    return [name for node in nodes for image in node.status.images or [] for name in image.names or []]


def check_nodes(api: kubernetes.CoreV1Api, cluster: Cluster) -> Result:
    """Check for each step that requests GPUs whether a node has enough of them, and accepts its pod.

    Raises:
        kubernetes.ApiException: listing nodes is not allowed.
    """
    nodes = [node for node in api.list_node().items if not node.spec.unschedulable]
    gpu_steps = {name: cluster.steps[name] for name in STEPS if cluster.steps[name].gpus}
    if not gpu_steps:
        return GOOD, f"{len(nodes)} accept pods; the profile requests no GPUs"
    lacking = [name for name, step in gpu_steps.items() if not any(_fits(node, step) for node in nodes)]
    if not lacking:
        return GOOD, f"{len(nodes)} accept pods, and each step with GPUs fits on one of them"
    name, step = lacking[0], gpu_steps[lacking[0]]
    settings = (STEPS[name].settings_of or name).replace("-", "_")
    max_gpus = max((_gpus(node, step) for node in nodes), default=0)
    return BAD, (
        f"no node has all of this for {name}: {step.gpus} × {step.gpu_resource} (the maximum is {max_gpus}), "
        f"the labels of node_selector, and no taints but tolerated ones. Lower steps.{settings}.gpus, or "
        "correct node_selector and tolerations. Ignore this if the cluster adds such nodes on demand."
    )


def _gpus(node: Any, step: StepSettings) -> int:
    return int((node.status.allocatable or {}).get(step.gpu_resource, 0))


def _fits(node: Any, step: StepSettings) -> bool:
    """Return whether a node has a step's number of GPUs and its labels, and only taints that it tolerates.

    CPU, memory, and GPUs that other pods use are not considered.
    """
    labels = node.metadata.labels or {}
    # PreferNoSchedule, the third effect, does not exclude a node.
    taints = [taint for taint in node.spec.taints or [] if taint.effect in ("NoSchedule", "NoExecute")]
    return (
        _gpus(node, step) >= step.gpus
        and all(labels.get(key) == value for key, value in step.node_selector.items())
        and all(any(_tolerates(t, taint) for t in step.tolerations) for taint in taints)
    )


def _tolerates(toleration: dict[str, str], taint: Any) -> bool:
    # By the rules of Kubernetes, a missing effect matches every effect, and with Exists, a missing key
    # matches every key.
    if toleration.get("effect", taint.effect) != taint.effect:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", taint.key) == taint.key
    return toleration.get("key") == taint.key and toleration.get("value", "") == (taint.value or "")
