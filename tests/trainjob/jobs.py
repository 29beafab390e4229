"""Settings of a TrainJob, and functions that create such a job or train with it."""

from dataclasses import replace

from slam_asr.artifacts.stage_record import Record
from slam_asr.config.recipe import load_recipe
from slam_asr.trainjob import follow
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.request import TrainJobClient, explained_refusals
from slam_asr.trainjob.train import train_on_nodes

PLACEMENT = Placement(
    namespace="team",
    image="registry.example/train:7",
    cache="/var/cache/slam-asr",
    resources={"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"},
    shared_memory="16Gi",
    scratch="100Gi",
    models_claim="models",
    storage_secret="bucket",
    token_secret="hub",
    environment={"NCCL_DEBUG": "INFO"},
    service_account="runner",
    run_as_user=1234,
    pull_secrets=["pull"],
    node_selector={"disk": "fast"},
    tolerations=[{"key": "gpu", "operator": "Exists"}],
    labels={"kueue.x-k8s.io/queue-name": "research"},
    annotations={"note": "hello"},
    timeout_hours=2,
)
MANIFEST, STORE = "s3://bucket/manifests/train.jsonl", "s3://bucket/store"
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes are available: 1 Insufficient cpu.",
        }
    ],
}
"""Status of a pod for which no node has enough cores."""


def create(**settings) -> bool:
    """Create a job or find it, and return whether it is new."""
    placement = replace(PLACEMENT, **settings)
    with explained_refusals(placement):
        return follow.FollowedTrainJob(TrainJobClient(placement), "a-job").find_or_create(2, ["slam-asr"])


def start(**changes) -> Record:
    """Train on two nodes, with changes to the arguments of `train_on_nodes`."""
    recipe = load_recipe("demo", {"training.nodes": 2})
    values = {
        "recipe": recipe,
        "placement": PLACEMENT,
        "train_manifest": MANIFEST,
        "store": STORE,
        "dev_manifest": "s3://bucket/dev.jsonl",
    }
    return train_on_nodes(**(values | changes))


def as_the_api_reads(job: dict):
    """Return a job as Trainer's own type, which drops fields that it does not know."""
    # Imported here, because this import takes two seconds, and each pytest-xdist worker imports the tests.
    from kubeflow_trainer_api import models

    return models.TrainerV1alpha1TrainJob.from_dict(job)
