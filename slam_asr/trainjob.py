"""Training over several nodes: a TrainJob of Kubeflow Trainer, started and watched by the step `train`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Placement:
    """What each node's pod of a TrainJob gets: the cluster's share of the matter, where the recipe says how many nodes there are."""

    namespace: str
    image: str
    runtime: str = "torch-distributed"
    """Name of the ClusterTrainingRuntime."""
    resources: dict[str, str] = field(default_factory=dict)
    """cpu, memory and GPUs by their resource's name, asked for and at most."""
    shared_memory: str = ""
    """Size of /dev/shm."""
    scratch: str = ""
    """Size of the disk at `cache`."""
    cache: str = "/var/cache/slam-asr"
    """Where SLAM_ASR_CACHE points to."""
    models_claim: str = ""
    """PersistentVolumeClaim that is mounted at `cache`/models."""
    storage_secret: str = ""
    """Secret that is mounted at /var/run/secrets/slam-asr/s3."""
    token_secret: str = ""
    """Secret that HF_TOKEN comes from."""
    environment: dict[str, str] = field(default_factory=dict)
    service_account: str = ""
    run_as_user: int = 1000
    pull_policy: str = "IfNotPresent"
    pull_secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    """Of the TrainJob and its pods; Kueue's queue and priority are among them."""
    annotations: dict[str, str] = field(default_factory=dict)
    timeout_hours: float = 0.0
    """0: none."""
