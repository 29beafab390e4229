"""What differs between a Kubeflow for a single user and one for several: namespaces, and pages that load."""

from kubernetes import client as kubernetes

from pipelines.cluster import Cluster
from pipelines.kubeflow.backend import has_runtime, pipeline_root
from pipelines.kubeflow.connection import Connection
from slam_asr.findings import BAD, GOOD, UNKNOWN, Finding

_OWN_ROOT = "minio://mlpipeline/"
"""Beginning of the pipeline roots in the object storage that Kubeflow Pipelines brings along."""


def check_pages(api: kubernetes.CoreV1Api, connection: Connection) -> Finding:
    """Check whether the dashboard can show the reports and curves of runs.

    For several users, the dashboard drops provider settings with secrets for namespaces other than its own
    (`frontend/server` of Kubeflow Pipelines 2.17.0), so it reads only from the cluster's own store.

    Raises:
        kubernetes.ApiException: the launcher's configuration cannot be read.
    """
    root = pipeline_root(api, connection.namespace)
    if not connection.multi_user or not root or root.startswith(_OWN_ROOT):
        return Finding(GOOD, "pages", "the dashboard can show reports and curves")
    return Finding(
        UNKNOWN,
        "pages",
        f"for several users the dashboard shows pages only from {_OWN_ROOT}…, but artifacts go to {root}: "
        f"remove defaultPipelineRoot (`kubectl -n {connection.namespace} edit configmap kfp-launcher`), or "
        "open report.html in the store.",
    )


def check_trainjobs(cluster: Cluster, namespace: str, nodes: int = 1) -> Finding:
    """Check that the TrainJobs of multi-node training are in the namespace of the runs.

    Args:
        cluster: the profile, whose `namespace` is that of the TrainJobs.
        namespace: namespace of the runs, with account, secrets and volume.
        nodes: number of nodes to train on, if that is known.

    Raises:
        kubernetes.ApiException: the API refuses the request.
    """
    if cluster.namespace == namespace:
        return Finding(GOOD, "TrainJobs", f"are created in {namespace}, where the runs are")
    if nodes == 1 and not has_runtime(cluster):
        return Finding(UNKNOWN, "TrainJobs", "are not used: the cluster has no Kubeflow Trainer")
    return Finding(
        BAD if nodes > 1 else UNKNOWN,
        "TrainJobs",
        f"are created in {cluster.namespace}, the profile's namespace, but runs, account, secrets and volume "
        f"are in {namespace}: write `namespace: {namespace}` into the profile before a multi-node training.",
    )
