"""Kubeflow's Model Registry, through its own client.

The client's version decides which API it uses. Version 0.3.14 is the last that uses v1alpha3, which is the
only API of servers from before the summer of 2026. Newer servers have both v1alpha3 and v1, but v1alpha3 only
for a limited time (https://github.com/kubeflow/hub/issues/2992).
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import re
import warnings
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import aiohttp
from model_registry import ModelRegistry
from model_registry.exceptions import StoreError
from model_registry.types import ModelVersion
from mr_openapi import ModelVersionState
from mr_openapi import exceptions as api

from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.publishing.registry import SCORES, Properties, Version

ADDRESS, TOKEN = "MODEL_REGISTRY_URL", "MODEL_REGISTRY_TOKEN"
"""Environment variables with the server's address and with a token for it. If no token is set, the client
reads one from the file that KF_PIPELINES_SA_TOKEN_PATH names, or uses the pod's own token."""
_AUTHOR = "slam-asr"
_FORMAT = {"model_format_name": "slam-asr", "model_format_version": "2"}
_PATIENCE = 60.0
"""Maximum time of a request in seconds. The client itself would wait for five minutes."""

T = TypeVar("T")


class KubeflowRegistry:
    """A registered model in Kubeflow's Model Registry. The name of a version is the model's fingerprint.

    Args:
        name: name of the registered model.

    Raises:
        ConfigurationError: MODEL_REGISTRY_URL is not set, does not begin with http:// or https://, or has a
            path.
        ClusterError: the server does not answer, or refuses access.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = os.environ.get(ADDRESS, "").rstrip("/")
        # The client accepts only an address without a path.
        if not re.fullmatch(r"https?://[^/@\s]+", self.address):
            raise ConfigurationError(
                f"publish.registry is kubeflow, but {ADDRESS} is {self.address!r}: set it to the registry's "
                "address, such as http://model-registry-service.kubeflow:8080 (in a cluster profile, below "
                "`environment`)."
            )
        with self._explained(), warnings.catch_warnings():
            # The client warns if it has no token, but a server inside the cluster may not need one.
            warnings.simplefilter("ignore")
            self.client = ModelRegistry(
                self.address,
                author=_AUTHOR,
                user_token=os.environ.get(TOKEN),
                log_level=logging.ERROR,
                async_runner=_run,
            )

    def find(self, fingerprint: str) -> Version | None:
        """Return the version of the model with a fingerprint, or None if it is not registered."""
        with self._explained():
            found = self._find(fingerprint)
        return found and _version(found)

    def newest(self) -> Version | None:
        """Return the newest version that is not archived, or None if there is none."""
        with self._explained():
            if self.client.get_registered_model(self.name) is None:
                return None
            versions = self.client.get_model_versions(self.name).order_by_creation_time().descending()
            live = next((v for v in versions if v.state == ModelVersionState.LIVE), None)
        return live and _version(live)

    def register(self, fingerprint: str, uri: str, description: str, properties: Properties) -> Version:
        """Register a model, unless it is registered already, and return its version."""
        with self._explained():
            known = self._find(fingerprint)
            if known is None:
                facts = {"version_description": description, "metadata": properties}
                self.client.register_model(self.name, uri, version=fingerprint, **facts, **_FORMAT)
            elif self.client.get_model_artifact(self.name, fingerprint) is None:
                # An earlier attempt ended after the request for the version and before the one for its
                # artifact. No public method of the client adds an artifact to an existing version.
                request = self.client._register_model_artifact(known, self.name, uri, **_FORMAT)
                self.client.async_runner(request)
        return _version(known) if known else Version(fingerprint, str(properties[SCORES]))

    def _find(self, fingerprint: str) -> ModelVersion | None:
        if self.client.get_registered_model(self.name) is None:
            return None
        return self.client.get_model_version(self.name, fingerprint)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's exceptions into `ClusterError`s of one sentence each."""
        try:
            yield
        except (api.OpenApiException, aiohttp.ClientError, StoreError, TimeoutError, ValueError) as error:
            raise ClusterError(f"The Model Registry at {self.address} {_explain(error)}.") from None


def _explain(error: Exception) -> str:
    """Return what the server does wrong, and what to do."""
    why = f"{error.status} {error.reason}" if isinstance(error, api.ApiException) else str(error)
    match error:
        case api.UnauthorizedException() | api.ForbiddenException() | StoreError():
            remedy = f"put a valid token into {TOKEN} (a cluster profile names its secret in registry.secret)"
            return f"refuses access ({why}): {remedy}"
        case aiohttp.ClientConnectionError() | TimeoutError():
            return f"does not answer ({why or 'no answer in time'}): start it, or check {ADDRESS}"
        case api.ServiceException():
            return f"reports an error of its own ({why}): see its log, then run the same command again"
        case api.NotFoundException():
            client = importlib.metadata.version("model-registry")
            return (
                f"does not know the requests of the client model-registry {client} (404): check {ADDRESS}; "
                "versions up to 0.3.14 use the API v1alpha3, and newer ones the API v1"
            )
    return f"does not answer like a Model Registry ({' '.join(why.split())[:200]}): check {ADDRESS}"


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str((found.custom_properties or {}).get(SCORES, "")))


def _run(request: Coroutine[Any, Any, T]) -> T:
    """Run one request of the client. The client's own runner would patch asyncio for the complete process."""

    async def bounded() -> T:
        return await asyncio.wait_for(request, _PATIENCE)

    return asyncio.run(bounded())
