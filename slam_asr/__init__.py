"""SLAM-ASR: a frozen speech encoder and a frozen LLM, joined by one small trained projector.

This library implements the stages `build-manifest`, `extract-features`, `train`, `convert-checkpoint`,
`decode` and others. It does not depend on Kubeflow; `components/` and `pipelines/` connect it to Kubeflow.
"""

__version__ = "0.1.0"
