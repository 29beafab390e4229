"""What a stage needs of a model registry, whichever it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
