"""Kubeflow Pipelines from the outside: submit, follow, read logs, start again."""
