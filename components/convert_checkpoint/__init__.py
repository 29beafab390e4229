"""Kubeflow's view of the stage `convert-checkpoint`."""
