"""The sections `gate` and `publish` of a recipe."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slam_asr.config.schema import bounded

_NAME = re.compile(r"[\w.-]+( [\w.-]+)*")


@dataclass
class Gate:
    """When a trained model is good enough to be published. By default, any model is."""

    max_wer: float | None = bounded(None, at_least=0.0)
    """Highest word error rate in percent over all test sets, or character error rate where characters are
    counted. Default: no limit."""
    better_than: Literal["none", "registered"] = "none"
    """`registered`: the model must be significantly better than the newest registered version, by matched
    pairs on the same utterances, as `slam-asr compare` computes them. A first version needs no comparison."""

    @property
    def active(self) -> bool:
        """Whether the gate has a condition."""
        return self.max_wer is not None or self.better_than != "none"


@dataclass
class Publish:
    """Where the training pipeline registers the model, if the gate lets it pass."""

    registry: Literal["none", "kubeflow", "mlflow"] = "none"
    """`kubeflow`: Kubeflow's Model Registry at MODEL_REGISTRY_URL. `mlflow`: MLflow's registry at
    MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI. `none`: the pipeline does not publish."""
    name: str = ""
    """Name of the registered model. Default: the recipe's name."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence if a registry would refuse the name."""
        if self.name and not valid_name(self.name):
            yield (
                f"publish.name is {self.name!r}, but a registered model's name has only letters, digits, "
                "dots, dashes, underscores and single spaces."
            )


def valid_name(name: str) -> bool:
    """Return whether all registries accept a name; MLflow refuses slashes and colons."""
    return _NAME.fullmatch(name) is not None
