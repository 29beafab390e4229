"""Checks of the settings of Kubeflow, Argo and Trainer, and of the rights of a run's account."""

import re
from collections.abc import Iterator
from datetime import datetime

import urllib3
from kubernetes import client as kubernetes

from pipelines.cluster import Cluster
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.logs import core_api
from slam_asr.errors import ClusterError, UserError
from slam_asr.findings import BAD, GOOD, UNKNOWN, Finding

DEFAULT_SECRET = "mlpipeline-minio-artifact"
"""Secret that the launcher reads if `kfp-launcher` sets no pipeline root. Argo mounts it to archive logs."""
_OWN_ROOT = "minio://mlpipeline/"
"""Beginning of pipeline roots in the object storage that comes with Kubeflow Pipelines."""
_TRAINER = (2, 2)
"""First version of Kubeflow Trainer with `runtimePatches` in its TrainJob."""


def check_rights(cluster: Cluster, namespace: str, needs_default_secret: bool, nodes: int = 1) -> Finding:
    """Check the rights of the runs' account, by asking the cluster what this account may do.

    Args:
        cluster: the profile.
        namespace: namespace of the runs.
        needs_default_secret: whether the launcher reads `DEFAULT_SECRET`.
        nodes: number of nodes to train on; more than one needs rights for a TrainJob.

    Raises:
        kubernetes.ApiException: you are not allowed to ask, or the API does not answer.
    """
    subject = f"rights of {cluster.service_account}"
    missing = [
        f"{verb} {resource}{f' {name}' if name else ''}"
        for verb, group, resource, name in _needed_rights(cluster, needs_default_secret, nodes)
        if not _may(cluster.service_account, namespace, verb, group, resource, name)
    ]
    if missing:
        more = ", and manifests/components/trainer in your overlay grants what several nodes need" * (
            nodes > 1
        )
        return Finding(
            BAD,
            subject,
            f"it is not allowed to {', '.join(missing)} in {namespace}: "
            f"`kubectl apply -n {namespace} -k manifests/runner` grants what runs need{more}.",
        )
    return Finding(GOOD, subject, "it has the rights that Kubeflow's driver and launcher and Argo need")


def _needed_rights(
    cluster: Cluster, needs_default_secret: bool, nodes: int
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (verb, API group, resource, name); an empty name stands for all."""
    # Argo's executor reports the result of each pod in an object of this kind.
    yield "create", "argoproj.io", "workflowtaskresults", ""
    yield "patch", "argoproj.io", "workflowtaskresults", ""
    yield "get", "", "configmaps", "kfp-launcher"
    yield "get", "", "pods", ""
    if cluster.storage.secret:
        yield "get", "", "secrets", cluster.storage.secret
    if needs_default_secret and cluster.storage.secret != DEFAULT_SECRET:
        yield "get", "", "secrets", DEFAULT_SECRET
    if nodes > 1:
        for verb in ("get", "create", "delete", "patch"):
            yield verb, "trainer.kubeflow.org", "trainjobs", ""
        yield "list", "", "pods", ""
        yield "list", "", "events", ""
        yield "get", "", "pods/log", ""


def _may(account: str, namespace: str, verb: str, group: str, resource: str, name: str) -> bool:
    resource, _, subresource = resource.partition("/")
    attributes = kubernetes.V1ResourceAttributes(
        namespace=namespace,
        verb=verb,
        group=group,
        resource=resource,
        subresource=subresource or None,
        name=name or None,
    )
    # Rights may be bound to a group, and a review does not look up the account's groups. So it gets the
    # groups that every service account belongs to.
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    review = kubernetes.V1SubjectAccessReview(
        spec=kubernetes.V1SubjectAccessReviewSpec(
            user=f"system:serviceaccount:{namespace}:{account}", groups=groups, resource_attributes=attributes
        )
    )
    answer = kubernetes.AuthorizationV1Api().create_subject_access_review(review)
    return bool(answer.status.allowed)


def check_retries(api: kubernetes.CoreV1Api, cluster: Cluster) -> Finding:
    """Report which failures Argo retries. Argo's own configuration decides this, not the pipeline.

    Raises:
        kubernetes.ApiException: the configuration cannot be read.
    """
    namespace = cluster.kubeflow_namespace
    settings = _config_map(api, "workflow-controller-configmap", namespace)
    if settings is None:
        return Finding(
            UNKNOWN,
            "retries",
            f"{namespace} has no workflow-controller-configmap of Argo: write the namespace of Kubeflow into "
            "kubeflow_namespace of the profile",
        )
    # The policy is inside YAML text, in the value of whichever key the installation uses.
    policy = re.search(r"retryPolicy:\s*\"?(\w+)", "\n".join(settings.values()))
    explained = {
        "OnError": "lost, drained and preempted pods, but not failing exit codes or lack of memory (OnError)",
        "OnFailure": "failing exit codes, lack of memory and evictions, but not lost pods (OnFailure)",
        "Always": "every failure (Always)",
        "OnTransientError": "only errors that Argo regards as transient (OnTransientError)",
    }
    # If the configuration names no policy, Argo applies OnFailure to steps that ask for retries.
    name = policy[1] if policy else "OnFailure"
    return Finding(GOOD, "retries", f"Argo retries {explained.get(name, name)}")


def check_trainer_version(api: kubernetes.CoreV1Api) -> Finding:
    """Check the version of Kubeflow Trainer.

    Raises:
        kubernetes.ApiException: the version cannot be read.
    """
    public = _config_map(api, "kubeflow-trainer-public", "kubeflow-system")
    if public is None:
        return Finding(
            UNKNOWN,
            "Kubeflow Trainer",
            "is not installed in kubeflow-system; only multi-node training needs it, in version 2.2 or later",
        )
    version = re.search(r"\bv?(\d+)\.(\d+)(\.\d+)?", "\n".join(public.values()))
    if version is None:
        return Finding(UNKNOWN, "Kubeflow Trainer", "does not report its version; 2.2 or later is needed")
    if (int(version[1]), int(version[2])) < _TRAINER:
        return Finding(
            BAD,
            "Kubeflow Trainer",
            f"is {version[0]}, but training on several nodes needs 2.2 or later: install a newer one.",
        )
    return Finding(GOOD, "Kubeflow Trainer", f"is {version[0]}")


def check_launcher(api: kubernetes.CoreV1Api, namespace: str) -> Finding:
    """Check where Kubeflow's launcher saves artifacts.

    Raises:
        kubernetes.ApiException: the configuration or Kubeflow's own secret cannot be read.
    """
    subject, root = "launcher configuration", pipeline_root(api, namespace)
    if root:
        return Finding(GOOD, subject, f"artifacts go to {root}")
    # If it does not exist, this raises the 404 that doctor reports.
    api.read_namespaced_secret(DEFAULT_SECRET, namespace)
    return Finding(GOOD, subject, f"artifacts go to Kubeflow's own storage, with its secret {DEFAULT_SECRET}")


def pipeline_root(api: kubernetes.CoreV1Api, namespace: str) -> str:
    """Return where artifacts go; empty for Kubeflow's default, which also applies without `kfp-launcher`."""
    settings = _config_map(api, "kfp-launcher", namespace) or {}
    root: str = settings.get("defaultPipelineRoot") or ""
    return root


def check_pages(api: kubernetes.CoreV1Api, connection: Connection) -> Finding:
    """Check whether the dashboard can show the reports and curves of runs.

    In a multi-user Kubeflow, the dashboard ignores provider settings with secrets of namespaces other than
    its own (`frontend/server` of Kubeflow Pipelines 2.17.0), so it reads only Kubeflow's own object storage.

    Raises:
        kubernetes.ApiException: the launcher's configuration cannot be read.
    """
    root = pipeline_root(api, connection.namespace)
    if not connection.multi_user or not root or root.startswith(_OWN_ROOT):
        return Finding(GOOD, "pages", "the dashboard can show reports and curves")
    return Finding(
        UNKNOWN,
        "pages",
        f"a multi-user dashboard shows pages only from {_OWN_ROOT}…, but artifacts go to {root}: "
        f"remove defaultPipelineRoot (`kubectl -n {connection.namespace} edit configmap kfp-launcher`), or "
        "open report.html in the store.",
    )


def _config_map(api: kubernetes.CoreV1Api, name: str, namespace: str) -> dict[str, str] | None:
    """Return the content of a ConfigMap; None if it does not exist."""
    try:
        return api.read_namespaced_config_map(name, namespace).data or {}
    except kubernetes.ApiException as error:
        if error.status != 404:
            raise
        return None


def launcher_changed_after(namespace: str, time: datetime) -> bool | None:
    """Return whether `kfp-launcher` was changed after a time; None if this cannot be read from here."""
    try:
        metadata = (
            core_api().read_namespaced_config_map("kfp-launcher", namespace, _request_timeout=5.0).metadata
        )
    except (UserError, kubernetes.ApiException, urllib3.exceptions.HTTPError):
        return None
    # `managed_fields` records when each client last changed the object.
    changes = [field.time for field in metadata.managed_fields or []]
    return any(change and change > time for change in [metadata.creation_timestamp, *changes])


def check_runtime(cluster: Cluster) -> Finding:
    """Check that the runtime for training on several nodes exists.

    Raises:
        kubernetes.ApiException: the API refuses the request.
    """
    subject = f"training runtime {cluster.trainer.runtime}"
    if has_runtime(cluster):
        return Finding(GOOD, subject, "exists, for multi-node training")
    return Finding(
        UNKNOWN,
        subject,
        "does not exist; only multi-node training (training.nodes above 1) needs it and Kubeflow Trainer 2",
    )


def has_runtime(cluster: Cluster) -> bool:
    """Return whether the cluster has Kubeflow Trainer and the profile's runtime.

    Raises:
        kubernetes.ApiException: the API refuses the request, for example because a permission is missing.
    """
    try:
        # Without Kubeflow Trainer, the API does not know this kind of object, and answers 404 too.
        kubernetes.CustomObjectsApi().get_cluster_custom_object(
            "trainer.kubeflow.org", "v1alpha1", "clustertrainingruntimes", cluster.trainer.runtime
        )
    except kubernetes.ApiException as error:
        if error.status != 404:
            raise
        return False
    return True


def require_trainer(cluster: Cluster) -> None:
    """Check that the cluster supports multi-node training; accept it if this cannot be checked from here.

    Raises:
        ClusterError: the cluster lacks Kubeflow Trainer or the profile's runtime.
    """
    try:
        core_api()
        exists = has_runtime(cluster)
    except (UserError, kubernetes.ApiException, urllib3.exceptions.HTTPError):
        return
    if not exists:
        raise ClusterError(
            "The recipe trains on several nodes, but the cluster has no training runtime "
            f"{cluster.trainer.runtime}: install Kubeflow Trainer 2 with its runtimes, correct "
            "trainer.runtime in the profile, or set training.nodes to 1."
        )
