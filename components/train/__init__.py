"""Kubeflow's view of the stage `train`."""
