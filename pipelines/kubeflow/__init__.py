"""Client side of Kubeflow Pipelines: submit a run, follow it, read its logs, resume it, check a cluster."""
