"""SLAM-ASR: a frozen speech encoder and a frozen LLM, joined by one small trained projector.

This library implements the stages `build-manifest`, `extract-features`, `train`, `convert-checkpoint`,
`decode` and others. It does not depend on Kubeflow; `components/` and `pipelines/` connect it to Kubeflow.
"""

from slam_asr.runtime.cores import limit_threads

# Here, because torch and tokenizers read the number of threads when they are imported.
limit_threads()

__version__ = "0.1.0"
