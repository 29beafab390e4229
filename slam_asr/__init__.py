"""SLAM-ASR: a frozen speech encoder and a frozen LLM, joined by one small trained projector.

The library that implements the stages `build-manifest`, `extract-features`, `train`, `convert-checkpoint`,
`decode` and others. It does not depend on Kubeflow; `components/` and `pipelines/` connect it to that.
"""

__version__ = "0.1.0"
