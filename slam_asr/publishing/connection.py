"""Connects to the model registry that a recipe names."""

import importlib.util

from slam_asr.errors import ConfigurationError
from slam_asr.publishing.registry import Registry


def open_registry(kind: str, name: str) -> Registry:
    """Connect to a model registry, and check with one request that it answers.

    Args:
        kind: `publish.registry`.
        name: name of the registered model, which need not exist yet.

    Raises:
        ConfigurationError: the kind is `none`, the registry's package is not installed, or no address is set.
        ClusterError: the registry does not answer, or refuses access.
    """
    packages = {"kubeflow": ("model_registry", "slam-asr[registry]"), "mlflow": ("mlflow", "mlflow-skinny")}
    if kind not in packages:
        raise ConfigurationError(
            "publish.registry is none, so there is no registry to publish to: set it to kubeflow or mlflow."
        )
    module, requirement = packages[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(
            f"publish.registry needs the package {module}, which is not installed here: run "
            f"`pip install '{requirement}'` (for an image, add it to the build)."
        )
    # Each module is imported here, because it needs a package that is installed only where models are
    # published.
    if kind == "kubeflow":
        from slam_asr.publishing.kubeflow_registry import KubeflowRegistry

        return KubeflowRegistry(name)
    from slam_asr.publishing.mlflow_registry import MlflowRegistry

    return MlflowRegistry(name)
