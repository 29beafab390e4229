"""The connection to Kubeflow Pipelines: its endpoint, its token, and messages for its errors.

kfp's client and its generated API send the requests. The first request is always the health check, which
reveals a login page, an expired token or a wrong address.
"""

import contextlib
import functools
import io
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import kfp_server_api
import urllib3

from pipelines.cluster import Cluster
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.notices.workflow import Workflow, workflow_of
from slam_asr.storage.client import seconds_from_environment

ENDPOINT = "KF_PIPELINES_ENDPOINT"
"""Environment variable with the address of Kubeflow Pipelines."""
TOKEN = "KFP_EXISTING_TOKEN"
"""Environment variable with a token; kfp's own command line reads it too."""
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
"""Environment variable with the path of a file that contains a token."""
MOUNTED_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
"""File in which Kubeflow mounts a token into its notebooks and steps."""
PATIENCE = "SLAM_ASR_KFP_PATIENCE"
"""Environment variable with the time in seconds to retry while the endpoint does not answer (default 60)."""

T = TypeVar("T")


class NotFound(ClusterError):
    """The requested object does not exist (404)."""


class Connection:
    """Kubeflow Pipelines at one endpoint.

    Attributes:
        multi_user: whether it is installed for several users.
        namespace: the namespace in which its runs are.
        request_namespace: the namespace to name in requests; None for a single-user server.
    """

    def __init__(
        self, endpoint: str, namespace: str, certificates: str | None, kubeflow_namespace: str = "kubeflow"
    ) -> None:
        """Connect, and check that Kubeflow Pipelines answers.

        Args:
            endpoint: http:// or https:// address.
            namespace: namespace of the runs in a multi-user Kubeflow.
            certificates: file with the certificates of a private authority; None for the usual ones.
            kubeflow_namespace: namespace of Kubeflow itself. A single-user server puts every run there,
                whatever the request says.

        Raises:
            ConfigurationError: the address does not begin with http:// or https://, or the file that should
                contain the token does not exist.
            ClusterError: nothing or something other than Kubeflow Pipelines answers, or the token is refused.
        """
        self.endpoint = endpoint.rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(f"The endpoint is {endpoint}: begin it with http:// or https://.")
        self.token = _token()
        self._pool = urllib3.PoolManager(
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            ca_certs=certificates,
            timeout=urllib3.Timeout(connect=5, read=20),
            retries=False,
        )
        self.multi_user = self._check_health()
        self.namespace = namespace if self.multi_user else kubeflow_namespace
        self.request_namespace = self.namespace if self.multi_user else None
        from kfp.client import Client

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.client = Client(
                host=self.endpoint, namespace=namespace, existing_token=self.token, ssl_ca_cert=certificates
            )
        self.runs: kfp_server_api.RunServiceApi = self.client._run_api

    def call(self, what: str, request: Callable[[], T], once: bool = False) -> T:
        """Send a request, retry temporary failures, and return the answer.

        Args:
            what: the request as a verb and its object, for messages.
            request: sends the request.
            once: never retry. Set it for requests that create something: if the answer is lost, the object
                may already exist.

        Raises:
            NotFound: the requested object does not exist. NotFound is a ClusterError.
            ClusterError: the API refuses the request, or temporary failures lasted for `patience()` seconds.
        """
        deadline, pause = time.monotonic() + patience(), 0.2
        while True:
            try:
                # kfp's client prints links of its own, which are discarded.
                with contextlib.redirect_stdout(io.StringIO()):
                    return request()
            except kfp_server_api.ApiException as error:
                if error.status == 404:
                    message = _server_message(error.body) or "it does not exist"
                    raise NotFound(f"{self.endpoint} could not {what} (404: {message}).") from None
                # Codes below 500 are refusals, which a retry would get again; 429 only says that requests
                # come too fast.
                if error.status and error.status < 500 and error.status != 429:
                    raise ClusterError(self._refusal(what, error)) from None
                reason = _with_message(f"{error.status} {error.reason}", error.body)
            except (urllib3.exceptions.HTTPError, ValueError, TypeError, AttributeError) as error:
                # A truncated answer is not valid JSON, or lacks fields that the API's classes require.
                reason = _plain(error)
            if once:
                raise ClusterError(
                    f"{self.endpoint} failed to {what} ({reason}), or did so and its answer was lost: "
                    "check `python -m pipelines status` before you try again."
                )
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self.endpoint} could not {what} within {patience():g} s of retrying ({reason}): "
                    "try again later."
                )
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def link(self, run_id: str) -> str:
        """Return the address of the run's page in the dashboard."""
        return f"{self._dashboard()}/#/runs/details/{run_id}"

    def artifact(self, bucket: str, key: str) -> bytes | None:
        """Read an object of Kubeflow's own object storage through the dashboard, which has its credentials.

        Returns:
            The content; None if there is no dashboard at this address, or it cannot read the object.
        """
        fields = {"source": "minio", "namespace": self.namespace, "bucket": bucket, "key": key}
        try:
            answer = self._get(f"{self._dashboard()}/artifacts/get", fields)
        except urllib3.exceptions.HTTPError:
            return None
        # Unknown addresses may be answered with the dashboard's own page.
        is_page = "html" in answer.headers.get("content-type", "")
        return answer.data if answer.status == 200 and not is_page else None

    def workflow(self, run_id: str) -> Workflow | None:
        """Read a run's Argo workflow.

        Returns:
            The workflow; None if it cannot be read: the server has no API v1beta1 or returns no workflows
            there, it refuses the request, or temporary failures lasted for `patience()` seconds (see `call`).
        """
        request = functools.partial(
            self.runs.api_client.call_api,
            "/apis/v1beta1/runs/{run_id}",
            "GET",
            {"run_id": run_id},
            response_type="object",
            auth_settings=["Bearer"],
            _return_http_data_only=True,
        )
        try:
            return workflow_of(self.call("read the run's workflow", request))
        except ClusterError:
            # Without the workflow, callers still know the states from v2beta1, and lack only the reasons.
            return None

    def version(self) -> str:
        """Return the server's version, such as `2.17.0`; empty if it does not say (some builds do not)."""
        # In the published API, only v1beta1's answer has a version. The dashboard, which passes the request
        # on, gives the key another name.
        for api in ("v2beta1", "v1beta1"):
            try:
                health = json.loads(self._get(f"{self.endpoint}/apis/{api}/healthz").data)
            except (urllib3.exceptions.HTTPError, ValueError):
                continue
            named = isinstance(health, dict) and (health.get("tag_name") or health.get("apiServerTagName"))
            if isinstance(named, str) and named != "unknown":
                return named
        return ""

    def _dashboard(self) -> str:
        return (os.environ.get("KF_PIPELINES_UI_ENDPOINT") or self.endpoint).rstrip("/")

    def _get(self, address: str, fields: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        # Redirects are not followed: they most likely lead to a login page.
        return self._pool.request("GET", address, fields=fields, redirect=False)

    def _check_health(self) -> bool:
        """Send the health check, and return whether Kubeflow is installed for several users."""
        deadline = time.monotonic() + patience()
        while True:
            try:
                answer = self._get(f"{self.endpoint}/apis/v2beta1/healthz")
                if answer.status < 500:
                    break
                reason = _with_message(f"HTTP {answer.status}", answer.data)
            except (
                urllib3.exceptions.SSLError,
                urllib3.exceptions.NameResolutionError,
                urllib3.exceptions.NewConnectionError,
            ) as error:
                # Retrying does not help if the address is wrong.
                raise ClusterError(
                    f"Nothing answers at {self.endpoint} ({_plain(error)}): "
                    "check --endpoint, or the port-forward to it."
                ) from None
            except urllib3.exceptions.HTTPError as error:
                reason = _plain(error)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Kubeflow Pipelines at {self.endpoint} did not answer within {patience():g} s of "
                    f"retrying ({reason}): try again later."
                )
            time.sleep(0.5)
        if answer.status in (301, 302, 303, 307, 308) or "html" in answer.headers.get("content-type", ""):
            raise ClusterError(
                f"{self.endpoint} answers with a web page, most likely a login page: set {TOKEN} to a token "
                f"or {TOKEN_FILE} to a file with one, or use a port-forward to ml-pipeline."
            )
        if answer.status in (401, 403):
            raise ClusterError(self._not_authenticated(answer.status, answer.data))
        try:
            health = json.loads(answer.data)
        except ValueError:
            health = None
        if answer.status != 200 or not isinstance(health, dict):
            raise ClusterError(
                f"{self.endpoint} has no Kubeflow Pipelines 2 API at /apis/v2beta1 "
                f"(HTTP {answer.status}): check --endpoint."
            )
        return bool(health.get("multi_user"))

    def _not_authenticated(self, status: int, body: Any) -> str:
        answer = _with_message(str(status), body)
        if not self.token:
            return (
                f"{self.endpoint} asks for a token ({answer}): put one into {TOKEN}, or its file into "
                f"{TOKEN_FILE}; `kubectl create token ACCOUNT --audience pipelines.kubeflow.org` makes one."
            )
        return (
            f"{self.endpoint} refuses the token ({answer}): tokens expire; "
            f"put a new one into {TOKEN} or {TOKEN_FILE}."
        )

    def _refusal(self, what: str, error: kfp_server_api.ApiException) -> str:
        if error.status == 401:
            return self._not_authenticated(error.status, error.body)
        if error.status == 403:
            return (
                f"You are not allowed to {what} in the namespace {self.namespace} "
                f"({_with_message('403', error.body)}): "
                "check --namespace, or ask for the role `kubeflow-edit` there."
            )
        reason = _server_message(error.body) or error.reason
        return f"{self.endpoint} refuses to {what} ({error.status}: {reason})."


@dataclass
class ConnectionOptions:
    """Options that locate Kubeflow Pipelines."""

    endpoint: str | None = None
    """address of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT, else the profile's)"""
    namespace: str | None = None
    """namespace of the runs (default: the profile's)"""
    ca_cert: str | None = None
    """file with the certificates of a private authority"""


def connect(options: dict[str, Any], cluster: Cluster) -> Connection:
    """Connect to the endpoint that the options, the environment or the profile name, in this order.

    Raises:
        ConfigurationError: no endpoint is named, its address does not begin with http:// or https://, or the
            file that should contain the token does not exist.
        ClusterError: Kubeflow Pipelines does not answer there.
    """
    endpoint = options["endpoint"] or os.environ.get(ENDPOINT) or cluster.endpoint
    if not endpoint:
        raise ConfigurationError(
            f"No endpoint of Kubeflow Pipelines is named: give --endpoint, set {ENDPOINT}, or write "
            "`endpoint` into the cluster profile."
        )
    return Connection(
        endpoint, options["namespace"] or cluster.namespace, options["ca_cert"], cluster.kubeflow_namespace
    )


def patience() -> float:
    """Return the seconds for which temporary failures are retried.

    Raises:
        ConfigurationError: the environment variable is not a number of seconds.
    """
    return seconds_from_environment(PATIENCE, 60.0)


def _token() -> str | None:
    if token := os.environ.get(TOKEN):
        return token.strip()
    path = os.environ.get(TOKEN_FILE)
    file = Path(path or MOUNTED_TOKEN)
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    if path:
        raise ConfigurationError(
            f"{TOKEN_FILE} is {path}, which is not a file: put a token there, or unset it."
        )
    return None


def _server_message(body: Any) -> str:
    """Return the server's own message on one line; empty if its answer has none, or is a web page."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError):
        answer = json.loads(text)
        if isinstance(answer, dict):
            text = str(answer.get("message") or answer.get("error") or "")
    # A proxy before the server answers in plain text, or with a page.
    return "" if "<html" in text.lower() else " ".join(text.split())[:300].rstrip(".")


def _with_message(status: str, body: Any) -> str:
    """Return an HTTP status with the server's message, if its answer has one."""
    return ": ".join(filter(None, (status, _server_message(body))))


def _plain(error: Exception) -> str:
    """Return the last, most specific part of an error's text on one line."""
    text = str(getattr(error, "reason", None) or error)
    return " ".join(text.split()).split(": ")[-1].rstrip(".")[:200] or type(error).__name__
