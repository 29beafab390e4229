"""Kubeflow's view of the stage `build-manifest`."""
