"""Settings for the pods of a TrainJob's nodes.

They come from the cluster's profile, and are part of the compiled pipeline.
"""

from dataclasses import dataclass, field
from typing import Any

NO_LIMIT = "none"
"""Value of `cpu_limit` for a container that may use all free cores of its node."""


@dataclass
class Placement:
    """Settings for the pod of each node of a TrainJob.

    They depend on the cluster; the number of nodes is the recipe's (`training.nodes`).
    """

    namespace: str
    image: str
    cache: str
    """Path for SLAM_ASR_CACHE in the container."""
    runtime: str = "torch-distributed"
    """Name of the ClusterTrainingRuntime."""
    resources: dict[str, str] = field(default_factory=dict)
    """Requests and limits of each node, by resource name: cpu, memory, and for example nvidia.com/gpu."""
    cpu_limit: str = ""
    """Limit of the cores of each node if it differs from the request; `NO_LIMIT` for no limit."""
    shared_memory: str = ""
    """Size of /dev/shm."""
    scratch: str = ""
    """Size of the disk at `cache`."""
    models_claim: str = ""
    """PersistentVolumeClaim to mount at `cache`/models."""
    storage_secret: str = ""
    """Secret with access to object storage; mounted where `slam_asr.storage` reads it."""
    token_secret: str = ""
    """Secret that contains HF_TOKEN; mounted as a file, to which HF_TOKEN_PATH points."""
    environment: dict[str, str] = field(default_factory=dict)
    service_account: str = ""
    run_as_user: int = 1000
    pull_secrets: list[str] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the TrainJob and its pods, such as Kueue's queue and priority."""
    annotations: dict[str, str] = field(default_factory=dict)
    timeout_hours: float = 0.0
    """Time limit of the job in hours; 0 means no limit.

    Each attempt at the step has a job of its own, unless the attempt before was killed: then the next one
    follows that job.
    """
