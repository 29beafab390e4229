"""Pipelines define which steps run, and in what order.

They are compiled for a cluster, or run on this machine:

python -m pipelines run demo
python -m pipelines compile
"""
