"""What each node's pod of a TrainJob gets; written into the compiled pipeline by the cluster's profile."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Placement:
    """What each node's pod of a TrainJob gets: the cluster's share of the matter, where the recipe says how many nodes there are."""

    namespace: str
    image: str
    cache: str
    """Where SLAM_ASR_CACHE points to."""
    runtime: str = "torch-distributed"
    """Name of the ClusterTrainingRuntime."""
    resources: dict[str, str] = field(default_factory=dict)
    """cpu, memory and GPUs by their resource's name, asked for and at most."""
    shared_memory: str = ""
    """Size of /dev/shm."""
    scratch: str = ""
    """Size of the disk at `cache`."""
    models_claim: str = ""
    """PersistentVolumeClaim that is mounted at `cache`/models."""
    storage_secret: str = ""
    """Secret that is mounted where `slam_asr.storage` looks for it."""
    token_secret: str = ""
    """Secret that HF_TOKEN comes from."""
    environment: dict[str, str] = field(default_factory=dict)
    service_account: str = ""
    run_as_user: int = 1000
    pull_secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    """Of the TrainJob and its pods; Kueue's queue and priority are among them."""
    annotations: dict[str, str] = field(default_factory=dict)
    timeout_hours: float = 0.0
    """Time after which the job is given up; 0: none."""
