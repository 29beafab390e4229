"""The face that each stage shows to Kubeflow: typed inputs and outputs, an image, no logic.

kfp cuts a component's body out of its module, so a body imports all that it uses, and calls the
same function as the command line does.

Images are named at compile time, here and nowhere else: `SLAM_ASR_IMAGES` is a template such as
`registry.example/team/{stage}:{version}`.
"""

import os

from slam_asr import __version__

RESULTS = {
    "build-manifest": "manifests",
    "extract-features": "features",
    "train": "checkpoint",
    "convert-checkpoint": "model",
    "decode": "hypotheses",
}
"""The stages in the order in which they run, and the output of each that points to its folder."""

IMAGES_VARIABLE = "SLAM_ASR_IMAGES"
DEFAULT_IMAGES = "slam-asr/{stage}:{version}"


def image(stage: str) -> str:
    """The image that `stage` runs in."""
    template = os.environ.get(IMAGES_VARIABLE) or DEFAULT_IMAGES
    return template.replace("{stage}", stage).replace("{version}", __version__)
