"""Which stages run, in what order: compiled for a cluster, or run on this machine.

python -m pipelines run demo
python -m pipelines compile
"""

TRAINING = "slam-asr"
EVALUATION = "slam-asr-evaluate"
SWEEP = "slam-asr-sweep"
"""The pipelines' names in Kubeflow."""
