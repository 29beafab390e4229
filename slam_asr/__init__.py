"""SLAM-ASR: a frozen speech encoder and a frozen LLM, joined by one small trained projector.

The library behind the five stages `build-manifest`, `extract-features`, `train`,
`convert-checkpoint` and `decode`. It knows nothing of Kubeflow; `components/` and `pipelines/`
do that.
"""

__version__ = "0.1.0"
