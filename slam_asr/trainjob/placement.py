"""The settings for the pods of a TrainJob's nodes.

They come from the cluster's profile, and are part of the compiled pipeline.
"""

from dataclasses import dataclass, field
from typing import Any

NO_LIMIT = "none"
"""Value of `cpu_limit` for a container that may use all free cores of its node."""


@dataclass
class Placement:
    """Settings for the pod of each node of a TrainJob.

    These settings depend on the cluster. The number of nodes comes from the recipe (`training.nodes`).
    """

    namespace: str
    image: str
    cache: str
    """Value of SLAM_ASR_CACHE in the container."""
    runtime: str = "torch-distributed"
    """Name of the ClusterTrainingRuntime."""
    resources: dict[str, str] = field(default_factory=dict)
    """Requests and limits of each node, by resource name: cpu, memory, and for example nvidia.com/gpu."""
    cpu_limit: str = ""
    """Limit on each node's cores. Empty: the same as the request; `NO_LIMIT`: no limit."""
    shared_memory: str = ""
    """Size of /dev/shm, such as 8Gi. Empty: the default of the container runtime."""
    scratch: str = ""
    """Size of an empty volume at `cache`, such as 100Gi. Empty: no volume."""
    models_claim: str = ""
    """Name of the PersistentVolumeClaim to mount at `cache`/models. Empty: none."""
    storage_secret: str = ""
    """Name of the secret with access to object storage, mounted where `slam_asr.storage` reads it. Empty:
    none."""
    token_secret: str = ""
    """Name of the secret that contains HF_TOKEN, mounted as a file that HF_TOKEN_PATH names. Empty: none."""
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

    An attempt at the step deletes its job at the end, also after SIGTERM, so the next attempt creates a new
    job with the full time. If an attempt is killed without notice, its job continues, and the next attempt
    follows this job.
    """
