"""What a stage needs of a model registry, whichever it is."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from slam_asr.errors import ConfigurationError

Properties = Mapping[str, str | int | float]

FINGERPRINT, SCORES = "fingerprint", "scores"
"""Properties of a version: the digest that identifies the model, and the folder that score wrote for it."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    """The model's fingerprint in Kubeflow's registry, a number in MLflow's."""
    scores: str
    """Folder that score wrote for it; empty if another program registered the version."""


class Registry(Protocol):
    """A registered model in a model registry, and its versions.

    Every method raises ClusterError if the registry does not answer or refuses.
    """

    name: str
    """Name of the registered model."""
    address: str

    def find(self, fingerprint: str) -> Version | None:
        """Return the version of the model with a fingerprint, or None if it is not registered."""

    def newest(self) -> Version | None:
        """Return the newest version that is not archived, or None if there is none."""

    def register(self, fingerprint: str, uri: str, description: str, properties: Properties) -> Version:
        """Register a model, unless it is registered already, and return its version.

        Args:
            fingerprint: digest that identifies the model.
            uri: address of the model folder.
            description: a sentence for people.
            properties: facts about the model, with its fingerprint and scores.
        """


def open_registry(kind: str, name: str) -> Registry:
    """Connect to a model registry, and try it with one request.

    Args:
        kind: `publish.registry`.
        name: name of the registered model, which need not exist yet.

    Raises:
        ConfigurationError: the kind is `none`, the registry's package is not installed, or no address is set.
        ClusterError: the registry does not answer, or refuses.
    """
    # Imported here: each needs a package that is installed only where models are published.
    if kind == "kubeflow":
        _require_package("model_registry", "slam-asr[registry]")
        from slam_asr.publishing.kubeflow_registry import KubeflowRegistry

        return KubeflowRegistry(name)
    if kind == "mlflow":
        _require_package("mlflow", "mlflow-skinny")
        from slam_asr.publishing.mlflow_registry import MlflowRegistry

        return MlflowRegistry(name)
    raise ConfigurationError(
        "publish.registry is none, so there is no registry to publish to: set it to kubeflow or mlflow."
    )


def _require_package(module: str, requirement: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"publish.registry needs the package {module}, which is not installed here: run "
            f"`pip install '{requirement}'` (for an image, add it to the build)."
        )
