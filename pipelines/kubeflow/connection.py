"""The connection to Kubeflow Pipelines: where it is, who asks, and what its refusals mean.

kfp's own client and its generated API do the talking. Before anything else the endpoint is asked for
its health, since that is where a login page, an expired token or a wrong address shows.
"""

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import kfp_server_api
import urllib3
from jsonargparse import ArgumentParser

from pipelines.cluster import Cluster
from slam_asr.errors import UserError

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TOKEN = "KFP_EXISTING_TOKEN"
"""The variable in which kfp's own command line finds a token."""
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
MOUNTED_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
PATIENCE = "SLAM_ASR_KFP_PATIENCE"
"""Environment variable: seconds for which an endpoint that does not answer is asked again (default 60)."""

T = TypeVar("T")


class Gone(Exception):
    """The API has no such thing (404)."""


class Connection:
    """Kubeflow Pipelines at one endpoint, in one namespace."""

    def __init__(self, endpoint: str, namespace: str, certificates: str | None = None) -> None:
        """Connect, and see that it is Kubeflow Pipelines that answers.

        Args:
            endpoint: http:// or https:// address.
            namespace: where runs run.
            certificates: file with the certificates of a private authority.

        Raises:
            UserError: nothing answers, something else answers, or the token is refused.
        """
        self.endpoint, self.namespace = endpoint.rstrip("/"), namespace
        if not self.endpoint.startswith(("http://", "https://")):
            raise UserError(f"The endpoint is {endpoint}: write http:// or https:// before it.")
        self.token = _token()
        self.multi_user = self._health(certificates)
        from kfp.client import Client

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.client = Client(
                host=self.endpoint, namespace=namespace, existing_token=self.token, ssl_ca_cert=certificates
            )
        self.runs: kfp_server_api.RunServiceApi = self.client._run_api

    def call(self, what: str, request: Callable[[], T], once: bool = False) -> T:
        """One request, with its refusal in a sentence.

        Args:
            what: what is asked for, as a verb and its object.
            request: asks.
            once: never ask twice: it makes something, and a lost answer does not say whether it did.

        Raises:
            Gone: there is no such thing.
            UserError: anything else that went wrong; what may pass has been tried for a while.
        """
        deadline, pause = time.monotonic() + patience(), 0.2
        while True:
            try:
                return request()
            except kfp_server_api.ApiException as error:
                if error.status == 404:
                    raise Gone(what) from None
                if error.status and error.status < 500 and error.status != 429:
                    raise UserError(self._refusal(what, error)) from None
                reason = f"{error.status} {error.reason}"
            except (urllib3.exceptions.HTTPError, ValueError, TypeError, AttributeError) as error:
                # A body that was cut off is no JSON, or lacks what the API's model needs.
                reason = _plain(error)
            if once:
                raise UserError(
                    f"{self.endpoint} failed to {what} ({reason}); whether it did so all the same is not known: look at `python -m pipelines status` before you try again."
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.endpoint} does not {what} ({reason}); it was tried for {patience():g} s. Try again later."
                )
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def link(self, run_id: str) -> str:
        """The run's page in the dashboard."""
        page = os.environ.get("KF_PIPELINES_UI_ENDPOINT") or self.endpoint
        return f"{page.rstrip('/')}/#/runs/details/{run_id}"

    def _health(self, certificates: str | None) -> bool:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        pool = urllib3.PoolManager(
            ca_certs=certificates, timeout=urllib3.Timeout(connect=5, read=20), retries=False
        )
        deadline = time.monotonic() + patience()
        while True:
            try:
                answer = pool.request(
                    "GET", f"{self.endpoint}/apis/v2beta1/healthz", headers=headers, redirect=False
                )
                if answer.status < 500:
                    break
                reason = f"it answers {answer.status}"
            except (
                urllib3.exceptions.SSLError,
                urllib3.exceptions.NameResolutionError,
                urllib3.exceptions.NewConnectionError,
            ) as error:
                # An address that is wrong does not become right by asking again.
                raise UserError(
                    f"Nothing answers at {self.endpoint} ({_plain(error)}): check --endpoint, or the port-forward that is_coordinator there."
                ) from None
            except urllib3.exceptions.HTTPError as error:
                reason = _plain(error)
            if time.monotonic() > deadline:
                raise UserError(
                    f"Kubeflow Pipelines at {self.endpoint} does not answer ({reason}); it was tried for {patience():g} s. Try again later."
                )
            time.sleep(0.5)
        if answer.status in (301, 302, 303, 307, 308) or "html" in answer.headers.get("content-type", ""):
            raise UserError(
                f"{self.endpoint} answers with a web page, most likely a login: give a token in {TOKEN} or the file {TOKEN_FILE}, or use a port-forward to ml-pipeline."
            )
        if answer.status in (401, 403):
            raise UserError(
                f"{self.endpoint} refuses the token ({answer.status}): get a new one into {TOKEN} or {TOKEN_FILE}; they expire."
            )
        try:
            health = json.loads(answer.data)
        except ValueError:
            health = None
        if answer.status != 200 or not isinstance(health, dict):
            raise UserError(
                f"{self.endpoint} has no API of Kubeflow Pipelines 2 at /apis/v2beta1 (it answers {answer.status}): check --endpoint."
            )
        return bool(health.get("multi_user"))

    def _refusal(self, what: str, error: kfp_server_api.ApiException) -> str:
        if error.status == 401:
            return f"{self.endpoint} refuses the token (401): get a new one into {TOKEN} or {TOKEN_FILE}; they expire."
        if error.status == 403:
            return f"You may not {what} in the namespace {self.namespace} (403): check --namespace, or have somebody give you the role kubeflow-edit there."
        try:
            said = json.loads(error.body).get("message") or json.loads(error.body).get("error")
        except (ValueError, TypeError, AttributeError):
            said = error.reason
        return f"{self.endpoint} does not {what} ({error.status}: {' '.join(str(said).split())[:300].rstrip('.')})."


def add_connection_options(parser: ArgumentParser) -> None:
    """Give a parser the options that say where Kubeflow Pipelines is."""
    parser.add_argument(
        "--endpoint", type=str, help=f"address of Kubeflow Pipelines; else {ENDPOINT}, else the profile's"
    )
    parser.add_argument("--namespace", type=str, help="where runs run; else the profile's")
    parser.add_argument("--ca_cert", type=str, help="file with the certificates of a private authority")


def connect(options: dict[str, Any], cluster: Cluster) -> Connection:
    """The connection that options, environment and profile lead to.

    Raises:
        UserError: no endpoint is named, or it is not Kubeflow Pipelines that answers.
    """
    endpoint = options["endpoint"] or os.environ.get(ENDPOINT) or cluster.endpoint
    if not endpoint:
        raise UserError(
            f"Where is Kubeflow Pipelines? Give --endpoint, set {ENDPOINT}, or write endpoint into the cluster's profile."
        )
    return Connection(endpoint, options["namespace"] or cluster.namespace, options["ca_cert"])


def patience() -> float:
    """Seconds for which what may pass is tried."""
    try:
        return float(os.environ.get(PATIENCE, "60"))
    except ValueError:
        raise UserError(f"{PATIENCE} is {os.environ[PATIENCE]!r}: give a number of seconds.") from None


def _token() -> str | None:
    if token := os.environ.get(TOKEN):
        return token.strip()
    named = os.environ.get(TOKEN_FILE)
    file = Path(named or MOUNTED_TOKEN)
    if file.is_file():
        return file.read_text().strip()
    if named:
        raise UserError(f"{TOKEN_FILE} names {named}, which is no file: put a token there, or unset it.")
    return None


def _plain(error: Exception) -> str:
    text = str(getattr(error, "reason", None) or error)
    return " ".join(text.split()).split(": ")[-1].rstrip(".")[:200] or type(error).__name__
