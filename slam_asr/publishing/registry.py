"""The interface of a model registry, which the class for each registry implements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Properties = Mapping[str, str | int | float]

FINGERPRINT, SCORES = "fingerprint", "scores"
"""Properties of a version: the digest that identifies the model, and the folder that `score` wrote for it."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    """In Kubeflow's registry, the model's fingerprint; in MLflow's, a number."""
    scores: str
    """Folder that `score` wrote for the model; empty if another program registered the version."""


class Registry(Protocol):
    """A registered model in a model registry, and its versions.

    Every method raises `ClusterError` if the registry does not answer or refuses access.
    """

    name: str
    """Name of the registered model."""
    address: str
    """Address of the registry, for messages."""

    def find(self, fingerprint: str) -> Version | None:
        """Return the version of the model with a fingerprint, or None if it is not registered."""

    def newest(self) -> Version | None:
        """Return the newest version that is not archived, or None if there is none."""

    def register(self, fingerprint: str, uri: str, description: str, properties: Properties) -> Version:
        """Register a model, unless it is registered already, and return its version.

        Args:
            fingerprint: digest that identifies the model.
            uri: address of the model folder.
            description: a sentence that describes the version.
            properties: facts about the model, including its fingerprint and scores.

        Raises:
            ConfigurationError: an MLflow server takes only models in object storage, and `uri` is a local
                folder.
        """
