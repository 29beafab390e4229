"""Kubeflow's view of the stage `extract-features`."""
