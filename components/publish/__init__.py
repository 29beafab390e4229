"""Kubeflow components that run in the image of `publish`."""
