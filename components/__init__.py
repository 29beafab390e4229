"""The face that each stage shows to Kubeflow: typed inputs and outputs, an image, no logic.

kfp cuts a component's body out of its module, so a body imports all that it uses, and calls the
same function as the command line does.

Images are named at compile time. `SLAM_ASR_IMAGES` is a template such as
`registry.example/team/{stage}:{version}`, or the file of digests that `make images` writes.
"""

import importlib
import os
import re
from pathlib import Path
from typing import Any

import yaml

from slam_asr import __version__
from slam_asr.errors import UserError

RESULTS = {
    "build-manifest": "manifests",
    "extract-features": "features",
    "train": "checkpoint",
    "convert-checkpoint": "model",
    "decode": "hypotheses",
    "score": "scores",
}
"""The steps of the pipeline that trains, in the order in which they run, and the output of each that points to its folder."""

EVALUATION_RESULTS = {"open-model": "opened"} | {
    step: RESULTS[step] for step in ("build-manifest", "extract-features", "decode", "score")
}
"""The same of the pipeline that only measures a model."""

SWEEP_RESULTS = {
    "plan-sweep": "planned",
    **{step: RESULTS[step] for step in ("build-manifest", "extract-features")},
    "vary-recipe": "varied",
    **{step: RESULTS[step] for step in ("train", "convert-checkpoint", "decode", "score")},
    "compare-runs": "comparison",
}
"""The same of the pipeline that trains several variations."""

ALL_RESULTS = {"open-model": EVALUATION_RESULTS["open-model"]} | SWEEP_RESULTS
"""The same of every step of any pipeline."""

HOSTS = {
    "score": "decode",
    "open-model": "convert-checkpoint",
    "plan-sweep": "build-manifest",
    "vary-recipe": "build-manifest",
    "compare-runs": "decode",
}
"""The stage in whose image a step without one of its own runs."""

STAGES = tuple(step for step in RESULTS if step not in HOSTS)
"""The steps that have an image of their own."""

CACHE = "/var/cache/slam-asr"
"""Where the images have SLAM_ASR_CACHE."""

IMAGES_VARIABLE = "SLAM_ASR_IMAGES"
DEFAULT_IMAGES = "slam-asr/{stage}:{version}"

_REFERENCE = re.compile(
    r"([\w.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


def component_of(step: str) -> Any:
    """The component of a step."""
    name = step.replace("-", "_")
    module = f"{HOSTS[step].replace('-', '_')}.{name}" if step in HOSTS else f"{name}.component"
    return getattr(importlib.import_module(f"components.{module}"), name)


def image(step: str) -> str:
    """The image that a step runs in, as the environment says."""
    return images(os.environ.get(IMAGES_VARIABLE) or DEFAULT_IMAGES)[step]


def images(source: str) -> dict[str, str]:
    """The image of each step.

    Args:
        source: a template with {stage} and {version}, or a YAML file that names an image for each stage.

    Raises:
        UserError: no such file, one that leaves out a stage, or a name that no image can have.
    """
    if source.endswith((".yaml", ".yml")):
        named = _read(Path(source))
    else:
        named = {
            stage: source.replace("{stage}", stage).replace("{version}", __version__) for stage in STAGES
        }
    for stage, name in named.items():
        if not _REFERENCE.fullmatch(name):
            raise UserError(
                f"{name!r} cannot be the image of {stage}: write REGISTRY/NAME:TAG in lower case, such as registry.example/team/{stage}:{__version__}."
            )
    return named | {step: named[stage] for step, stage in HOSTS.items()}


def _read(path: Path) -> dict[str, str]:
    try:
        named = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"The file of images {path} cannot be read ({error.strerror}): `make images` writes one."
        ) from None
    except yaml.YAMLError:
        named = None
    if not isinstance(named, dict) or not all(isinstance(named.get(stage), str) for stage in STAGES):
        raise UserError(
            f"{path} must name an image for each of {', '.join(STAGES)}: `make images` writes such a file."
        )
    return {stage: named[stage] for stage in STAGES}
