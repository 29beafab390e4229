"""Checks of the settings of Kubeflow's launcher and of Argo, which the profile must not contradict.

The ConfigMap `kfp-launcher` in the namespace of the runs decides where the launcher saves artifacts, and with
whose credentials: `defaultPipelineRoot`, and for each kind of address (`s3://`, `minio://`) a provider with
an endpoint and a secret. The ConfigMap of Argo's controller decides what is retried, and whether logs are
archived.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubernetes import client as kubernetes

from pipelines.cluster import Cluster
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.kubernetes_api import UNREADABLE, config_map, core_api, if_exists
from pipelines.kubeflow.namespace import DEFAULT_SECRET, Result, create_secret
from slam_asr.errors import ConfigurationError
from slam_asr.findings import BAD, GOOD, UNKNOWN

_OWN_ROOT = "minio://mlpipeline/"
"""Beginning of the pipeline roots in the object storage that Kubeflow Pipelines brings along."""
_OWN_STORAGE = "Kubeflow's own storage"
_ARGO = "workflow-controller-configmap"
"""The ConfigMap of Argo's controller, in the namespace of Kubeflow."""


@dataclass(frozen=True)
class Launcher:
    """The configuration of Kubeflow's launcher in one namespace."""

    root: str = ""
    """`defaultPipelineRoot`; empty for Kubeflow's own object storage."""
    endpoint: str | None = None
    """Address of the S3 server, `http://` or `https://`; empty for AWS, None if no provider is configured."""
    secret: str = DEFAULT_SECRET
    """Secret with the credentials; empty if they come from the pod's environment or role."""
    keys: tuple[str, str] = ("accesskey", "secretkey")
    """Names of the key id and of the secret key in the secret."""


def read_launcher(api: kubernetes.CoreV1Api, namespace: str) -> Launcher:
    """Read the configuration. Kubeflow's defaults apply if `kfp-launcher` does not exist or names no root.

    Raises:
        kubernetes.ApiException: it cannot be read.
        ConfigurationError: Kubeflow cannot read its providers.
    """
    settings = config_map(api, "kfp-launcher", namespace) or {}
    root: str = settings.get("defaultPipelineRoot") or ""
    scheme, _, place = (root or _OWN_ROOT).partition("://")
    try:
        provider = (yaml.safe_load(settings.get("providers") or "") or {}).get(scheme) or {}
        return _with_provider(root, scheme, (provider.get("default") or {}) | _override_for(provider, place))
    except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"The `providers` of kfp-launcher cannot be read ({type(error).__name__}: {reason}): "
            f"correct them with `kubectl -n {namespace} edit configmap kfp-launcher`."
        ) from None


def _override_for(provider: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the first override of a provider for a bucket and prefix, such as `bucket/artifacts`."""
    bucket, _, prefix = place.partition("/")
    for override in provider.get("overrides") or provider.get("Overrides") or []:
        if override.get("bucketName") == bucket and prefix.startswith(override.get("keyPrefix") or ""):
            return {key: value for key, value in override.items() if value != ""}
    return {}


def _with_provider(root: str, scheme: str, provider: dict[str, Any]) -> Launcher:
    if not provider:
        # Kubeflow has a default provider for `minio://`; for `s3://` it asks the pod's environment.
        return Launcher(root) if scheme == "minio" else Launcher(root, secret="")
    endpoint = str(provider.get("endpoint") or "")
    if "amazonaws.com" in endpoint:
        endpoint = ""
    elif endpoint and "://" not in endpoint:
        endpoint = f"{'http' if provider.get('disableSSL') else 'https'}://{endpoint}"
    credentials = provider["credentials"]
    if credentials.get("fromEnv"):
        return Launcher(root, endpoint, secret="")
    secret = credentials["secretRef"]
    return Launcher(root, endpoint, secret["secretName"], (secret["accessKeyKey"], secret["secretKeyKey"]))


def check_launcher(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Result:
    """Check that the launcher can save artifacts, and that its settings do not contradict the profile's.

    Raises:
        kubernetes.ApiException: the configuration or its secret cannot be read.
    """
    edit = f"`kubectl -n {namespace} edit configmap kfp-launcher`"
    try:
        launcher = read_launcher(api, namespace)
    except ConfigurationError as error:
        return BAD, str(error)
    where = f"artifacts go to {launcher.root or _OWN_STORAGE}"
    if _other_server(launcher, cluster):
        return BAD, (
            f"{where} at {launcher.endpoint or 'AWS'}, but the profile's storage.endpoint is "
            f"{cluster.storage.endpoint or 'empty, for AWS'}: correct `providers` with {edit}, or the "
            "profile."
        )
    if not launcher.secret:
        return UNKNOWN, (
            f"{where} without a secret, so the role of the pods' account has to permit it; else name one in "
            f"`providers` with {edit}"
        )
    if lacks := _lacks(api, cluster, launcher, namespace):
        return BAD, f"{where} with the secret {launcher.secret}, {lacks}."
    return GOOD, f"{where}, with the secret {launcher.secret}"


def _other_server(launcher: Launcher, cluster: Cluster) -> bool:
    """Whether launcher and profile name different servers, although they name the same bucket or secret.

    Artifacts may be on another server than the results, with a secret of their own.
    """
    storage = cluster.storage
    if launcher.endpoint is None:
        return False
    root, store = (urlsplit(address).netloc for address in (launcher.root, storage.store))
    # Without a root, the launcher uses Kubeflow's own bucket; without a store, each run names its own.
    together = (root == store and root) or launcher.secret == storage.secret
    return bool(together) and _server(launcher.endpoint) != _server(storage.endpoint)


def _server(endpoint: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of an endpoint. Kubernetes has several names for the host of a service."""
    parts = urlsplit(endpoint.lower())
    host = (parts.hostname or "").removesuffix(".cluster.local").removesuffix(".svc")
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _lacks(api: kubernetes.CoreV1Api, cluster: Cluster, launcher: Launcher, namespace: str) -> str:
    """Return what is wrong with the launcher's secret, and how to correct it; empty if nothing is."""
    secret = if_exists(api.read_namespaced_secret, launcher.secret, namespace)
    if secret is None:
        create = create_secret(cluster, launcher.secret, namespace, *launcher.keys)
        return f"which does not exist in {namespace}: {create}"
    missing = [key for key in launcher.keys if key not in (secret.data or {})]
    if not missing:
        return ""
    return f"which has no key {' and no '.join(missing)}: correct it, or the keys in `providers`"


def check_pages(api: kubernetes.CoreV1Api, connection: Connection) -> Result:
    """Check whether the dashboard can show the reports and curves of runs.

    A multi-user dashboard ignores a provider with a secret, except in the dashboard's own namespace
    (`frontend/server` of Kubeflow Pipelines 2.17.0), so it reads only from Kubeflow's own object storage.

    Raises:
        kubernetes.ApiException: the launcher's configuration cannot be read.
    """
    root = (config_map(api, "kfp-launcher", connection.namespace) or {}).get("defaultPipelineRoot") or ""
    if not connection.multi_user or not root or root.startswith(_OWN_ROOT):
        return GOOD, "the dashboard can show reports and curves"
    return UNKNOWN, (
        f"a multi-user dashboard shows pages only from {_OWN_ROOT}…, but artifacts go to {root}: "
        f"remove defaultPipelineRoot (`kubectl -n {connection.namespace} edit configmap kfp-launcher`), or "
        "open report.html in the store."
    )


def check_log_archive(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Result:
    """Check that the secret for Argo's archive of logs exists in the namespace of the runs.

    If Argo archives logs, it mounts this secret into every pod, and without it no pod starts.

    Raises:
        kubernetes.ApiException: the configuration or the secret cannot be read.
    """
    settings = config_map(api, _ARGO, cluster.kubeflow_namespace) or {}
    try:
        repository = yaml.safe_load(settings.get("artifactRepository") or "") or {}
        secret = ((repository.get("s3") or {}).get("secretKeySecret") or {}).get("name")
        archives = bool(repository.get("archiveLogs"))
    except (yaml.YAMLError, AttributeError):
        return UNKNOWN, f"the artifactRepository in {_ARGO} is not valid YAML"
    if not archives:
        return GOOD, "Argo archives no logs: they are deleted with their pods"
    if not secret:
        return GOOD, "Argo archives logs, without a secret"
    if if_exists(api.read_namespaced_secret, secret, namespace) is None:
        return BAD, (
            f"Argo mounts the secret {secret} into every pod, to archive logs, but {namespace} has none: "
            f"{create_secret(cluster, secret, namespace, 'accesskey', 'secretkey')}."
        )
    return GOOD, f"Argo archives logs, with the secret {secret}"


def check_retries(api: kubernetes.CoreV1Api, cluster: Cluster) -> Result:
    """Report which failures Argo retries. Argo's own configuration decides this, not the pipeline.

    Raises:
        kubernetes.ApiException: the configuration cannot be read.
    """
    namespace = cluster.kubeflow_namespace
    settings = config_map(api, _ARGO, namespace)
    if settings is None:
        return UNKNOWN, (
            f"{namespace} has no {_ARGO} of Argo: write the namespace of Kubeflow into "
            "kubeflow_namespace of the profile"
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
    return GOOD, f"Argo retries {explained.get(name, name)}"


def launcher_changed_after(namespace: str, time: datetime) -> bool | None:
    """Return whether `kfp-launcher` was changed after a time; None if this cannot be read from here."""
    try:
        launcher = core_api().read_namespaced_config_map("kfp-launcher", namespace, _request_timeout=5.0)
    except UNREADABLE:
        return None
    metadata = launcher.metadata
    # `managed_fields` records when each client last changed the object.
    changes = [field.time for field in metadata.managed_fields or []]
    return any(change and change > time for change in [metadata.creation_timestamp, *changes])
