"""Checks of Kubeflow Trainer: its version, and the runtime for training on several nodes."""

import functools
import json
import re

from kubernetes import client as kubernetes

from pipelines.cluster import Cluster
from pipelines.kubeflow.kubernetes_api import UNREADABLE, config_map, core_api, if_exists
from pipelines.kubeflow.namespace import Result
from slam_asr.errors import ClusterError
from slam_asr.findings import BAD, GOOD, UNKNOWN
from slam_asr.trainjob.owner import TRAINER_API

_OLDEST = (2, 2)
"""First version of Kubeflow Trainer with `runtimePatches` in its TrainJob."""
_INSTALL = '`kubectl apply --server-side -k "https://github.com/kubeflow/trainer.git/manifests/overlays/{}?ref=v2.3.0"`'
"""The command of Trainer's own guide, for `manager` or `runtimes`."""


def check_version(api: kubernetes.CoreV1Api, nodes: int = 1) -> Result:
    """Check the version of Kubeflow Trainer.

    Args:
        api: client of the Kubernetes API.
        nodes: number of nodes to train on; with 1, nothing needs Trainer.

    Raises:
        kubernetes.ApiException: the version cannot be read.
    """
    try:
        public = config_map(api, "kubeflow-trainer-public", "kubeflow-system") or {}
    except kubernetes.ApiException as error:
        if error.status not in (401, 403):
            raise
        public = {}
    version = re.search(r"\bv?(\d+)\.(\d+)(\.\d+)?", "\n".join(public.values()))
    if version:
        name, new_enough = version[0], (int(version[1]), int(version[2])) >= _OLDEST
    else:
        # It may be in another namespace, or too old to name its version.
        schema = _schema()
        if schema is None:
            only = "" if nodes > 1 else "; only multi-node training needs it, in version 2.2 or later"
            sign = BAD if nodes > 1 else UNKNOWN
            return sign, f"is not installed{only}: {_INSTALL.format('manager')} installs it"
        new_enough = "runtimePatches" in schema
        name = "2.2 or later, by its schema" if new_enough else "older than 2.2, by its schema"
    if not new_enough:
        return BAD, (
            f"is {name}, but training on several nodes needs 2.2 or later: "
            f"{_INSTALL.format('manager')} installs a newer one."
        )
    return GOOD, f"is {name}"


def _schema() -> str | None:
    """Return the schema of Trainer's objects as the Kubernetes API publishes it; None without Trainer."""
    request = functools.partial(
        kubernetes.ApiClient().call_api,
        auth_settings=["BearerToken"],
        response_type="object",
        _return_http_data_only=True,
    )
    answer = if_exists(request, f"/openapi/v3/apis/{'/'.join(TRAINER_API)}", "GET")
    return None if answer is None else json.dumps(answer)


def check_runtime(cluster: Cluster, namespace: str, nodes: int = 1) -> Result:
    """Check that the runtime for training on several nodes exists.

    Args:
        cluster: the profile.
        namespace: namespace of the runs.
        nodes: number of nodes to train on; with 1, nothing needs the runtime.

    Raises:
        kubernetes.ApiException: the API refuses the request.
    """
    if has_runtime(cluster, namespace):
        return GOOD, "exists, for multi-node training"
    only = "" if nodes > 1 else "; only multi-node training (training.nodes above 1) needs it"
    return BAD if nodes > 1 else UNKNOWN, (
        f"does not exist{only}: {_INSTALL.format('runtimes')} installs it, or correct trainer.runtime"
    )


def has_runtime(cluster: Cluster, namespace: str) -> bool:
    """Return whether the cluster has Kubeflow Trainer and the profile's runtime.

    A runtime in the namespace of the runs overrides a cluster-wide runtime of the same name.

    Raises:
        kubernetes.ApiException: the API refuses the request, for example because a permission is missing.
    """
    api, name = kubernetes.CustomObjectsApi(), cluster.trainer.runtime
    # Without Kubeflow Trainer, the API knows neither kind of object, and answers 404 too.
    in_namespace = (*TRAINER_API, namespace, "trainingruntimes", name)
    in_cluster = (*TRAINER_API, "clustertrainingruntimes", name)
    return (
        if_exists(api.get_namespaced_custom_object, *in_namespace) is not None
        or if_exists(api.get_cluster_custom_object, *in_cluster) is not None
    )


def require_trainer(cluster: Cluster, namespace: str) -> None:
    """Check that the cluster supports multi-node training; accept it if this cannot be checked from here.

    Raises:
        ClusterError: the cluster lacks Kubeflow Trainer or the profile's runtime.
    """
    try:
        core_api()
        exists = has_runtime(cluster, namespace)
    except UNREADABLE:
        return
    if not exists:
        raise ClusterError(
            "The recipe trains on several nodes, but the cluster has no training runtime "
            f"{cluster.trainer.runtime}: install Kubeflow Trainer 2 with its runtimes, correct "
            "trainer.runtime in the profile, or set training.nodes to 1."
        )
