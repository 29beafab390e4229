"""Requests to the Kubernetes API, which need the pod's own account or the user's kubeconfig."""

from collections.abc import Callable
from typing import Any

from kubernetes import client as kubernetes
from kubernetes import config
from urllib3.exceptions import HTTPError

from slam_asr.errors import ClusterError, UserError

UNREADABLE = (UserError, kubernetes.ApiException, HTTPError)
"""Errors of a request whose answer is not essential: no access is configured, or the API refuses or does not
answer."""


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
        problem = f"The Kubernetes API could not {what} in {namespace} ({error.status} {error.reason})."
        if error.status in (401, 403):
            problem = (
                f"You are not allowed to {what} in the namespace {namespace} ({error.status}): ask for the "
                "role `view` there, or renew your login."
            )
    except HTTPError as error:
        name = type(error).__name__
        problem = f"The Kubernetes API does not answer ({name}): check KUBECONFIG and your connection."
    raise ClusterError(problem)


def if_exists(request: Callable[..., Any], *arguments: str) -> Any:
    """Return the answer to a request for an object, or None if the object does not exist.

    Raises:
        kubernetes.ApiException: the API refuses the request.
    """
    try:
        return request(*arguments)
    except kubernetes.ApiException as error:
        if error.status != 404:
            raise
        return None


def config_map(api: kubernetes.CoreV1Api, name: str, namespace: str) -> dict[str, str] | None:
    """Return the content of a ConfigMap; None if it does not exist."""
    found = if_exists(api.read_namespaced_config_map, name, namespace)
    return None if found is None else found.data or {}
