"""The pipelines: which steps run, in what order. Compiled for a cluster, or run on this machine.

python -m pipelines run demo
python -m pipelines compile
"""
