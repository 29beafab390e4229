"""Kubeflow components that run in the image of `train`."""
