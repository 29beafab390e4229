"""The Kubeflow components of the steps, and the names of their images.

A component declares a step's typed inputs, outputs and image, and contains no logic. kfp copies only the
function's source into the container. Each body therefore imports everything that it uses, and then calls the
step's function in `slam_asr`. If the step has a command, the command calls the same function.

Images are named at compile time. `SLAM_ASR_IMAGES` is a template such as
`registry.example/team/{stage}:{version}`, or the list of images that `make images` writes.
"""

import importlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from slam_asr import __version__
from slam_asr.errors import ConfigurationError
from slam_asr.steps import OWN_IMAGE, STEPS

if TYPE_CHECKING:
    from kfp.dsl.python_component import PythonComponent

CACHE = "/var/cache/slam-asr"
"""The cache folder inside the images, which set SLAM_ASR_CACHE to it."""

IMAGES_VARIABLE = "SLAM_ASR_IMAGES"
"""Environment variable with the template or the file that names the images; see `images`."""
DEFAULT_IMAGES = "slam-asr/{stage}:{version}"

_REFERENCE = re.compile(
    r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


def component_of(step: str) -> "PythonComponent":
    """Import and return the kfp component of a step."""
    return getattr(importlib.import_module(STEPS[step].module), step.replace("-", "_"))


def image(step: str) -> str:
    """Return the image in which a step runs, named by the environment or the default template."""
    return images(os.environ.get(IMAGES_VARIABLE) or DEFAULT_IMAGES)[step]


def images(source: str) -> dict[str, str]:
    """Return the image of every step.

    Args:
        source: template with {stage} and {version}, or a YAML file that names an image for each stage.

    Raises:
        ConfigurationError: the file cannot be read or lacks a stage, or a name is no valid image reference.
    """
    if source.endswith((".yaml", ".yml")):
        named = _read(Path(source))
    else:
        named = {
            stage: source.replace("{stage}", stage).replace("{version}", __version__) for stage in OWN_IMAGE
        }
    for stage, name in named.items():
        if not _REFERENCE.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} cannot be the image of {stage}: write REGISTRY/NAME:TAG in lower case, "
                f"such as registry.example/team/{stage}:{__version__}."
            )
    return named | {name: named[step.image] for name, step in STEPS.items() if step.image}


def _read(path: Path) -> dict[str, str]:
    try:
        named = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"The image list {path} cannot be read ({error.strerror}): `make images` writes one."
        ) from None
    except yaml.YAMLError:
        named = None
    if not isinstance(named, dict) or not all(isinstance(named.get(stage), str) for stage in OWN_IMAGE):
        raise ConfigurationError(
            f"{path} must name an image for each of {', '.join(OWN_IMAGE)}: `make images` writes such a file."
        )
    return {stage: named[stage] for stage in OWN_IMAGE}
