"""Kubeflow's view of the stage `decode`."""
