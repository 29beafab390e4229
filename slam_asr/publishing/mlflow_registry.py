"""MLflow's model registry. MLflow's own environment variables name the server and the account, as they do if
MLflow is the tracker."""

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.publishing.registry import FINGERPRINT, SCORES, Properties, Version
from slam_asr.storage import is_s3

_ADDRESSES = ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""MLflow's variables for retries and timeouts. With MLflow's defaults, a server that is down is noticed only
after minutes."""
_MISSING = "RESOURCE_DOES_NOT_EXIST"


class MlflowRegistry:
    """A registered model in MLflow's registry. The tag `fingerprint` of a version identifies the model.

    Args:
        name: name of the registered model.

    Raises:
        ConfigurationError: no variable names a server. MLflow would then write into the working folder.
        ClusterError: the server does not answer, or refuses access.
    """

    def __init__(self, name: str) -> None:
        if not any(os.environ.get(variable) for variable in _ADDRESSES):
            raise ConfigurationError(
                f"publish.registry is mlflow, but neither {' nor '.join(_ADDRESSES)} is set: set one to the "
                "server's address (in a cluster profile, below `environment`)."
            )
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        # Not an import statement: the images contain every package that such a statement names, but mlflow is
        # optional.
        self.mlflow = importlib.import_module("mlflow")
        self.name = name
        self.address = _without_password(self.mlflow.get_registry_uri())
        with self._explained():
            self.client = self.mlflow.MlflowClient()
            self.client.search_registered_models(max_results=1)

    def find(self, fingerprint: str) -> Version | None:
        """Return the version of the model with a fingerprint, or None if it is not registered."""
        same = [v for v in self._versions() if v.tags.get(FINGERPRINT) == fingerprint]
        return _version(same[0]) if same else None

    def newest(self) -> Version | None:
        """Return the newest version that is not archived, or None if there is none."""
        live = [v for v in self._versions() if v.current_stage != "Archived"]
        return _version(max(live, key=lambda v: int(v.version))) if live else None

    def register(self, fingerprint: str, uri: str, description: str, properties: Properties) -> Version:
        """Register a model, unless it is registered already, and return its version."""
        if known := self.find(fingerprint):
            return known
        if self.address.startswith("http") and not is_s3(uri):
            raise ConfigurationError(
                f"MLflow's registry at {self.address} takes only models in object storage, not {uri}: run "
                "with an s3:// prefix as the store."
            )
        with self._explained():
            try:
                self.client.get_registered_model(self.name)
            except self.mlflow.MlflowException as error:
                if error.error_code != _MISSING:
                    raise
                self.client.create_registered_model(self.name)
            tags = {key: str(value) for key, value in properties.items()}
            facts = {"tags": tags, "description": description}
            return _version(self.client.create_model_version(self.name, uri, **facts, await_creation_for=0))

    def _versions(self) -> list[Any]:
        with self._explained():
            return self.mlflow.search_model_versions(filter_string=f"name='{self.name}'")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn MLflow's exceptions into `ClusterError`s of one sentence each."""
        server = f"MLflow's registry at {self.address}"
        try:
            yield
        except self.mlflow.MlflowException as error:
            why = _without_password(" ".join(str(error).split()))[:200]
            if " 401 " in why or " 403 " in why or error.get_http_status_code() in (401, 403):
                remedy = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                raise ClusterError(f"{server} refuses access ({why}): {remedy}.") from None
            fault = "does not answer" if "failed with exception" in why else "refuses"
            raise ClusterError(f"{server} {fault} ({why}): check {' or '.join(_ADDRESSES)}.") from None


def _without_password(text: str) -> str:
    """Replace the user's name and password in an address by `…`."""
    return re.sub(r"//[^/]*@", "//…@", text)


def _version(found: Any) -> Version:
    return Version(str(found.version), found.tags.get(SCORES, ""))
