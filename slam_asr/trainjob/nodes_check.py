"""Run a short program on several nodes as a TrainJob, to check that training can run on them.

The job is created, followed and deleted in the same way as the job of a training run; see `train`.
"""

import secrets

from slam_asr.trainjob.follow import FollowedTrainJob, deleted_when_interrupted
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.request import TrainJobClient, explained_refusals


def run_on_nodes(placement: Placement, nodes: int, command: list[str]) -> None:
    """Run a command on several nodes, log the first node's output, and delete the job.

    Args:
        placement: settings for each node's pod, including the time limit.
        nodes: number of pods.
        command: program and arguments that each node runs.

    Raises:
        ClusterError: Kubeflow Trainer is not installed or refuses the job, Kubernetes does not answer, or the
            job was deleted or takes too long.
        UserError: a node failed. The message is that of the failed node.
    """
    # The name is random, because two checks at the same time must not follow the same job.
    name = f"slam-asr-doctor-{secrets.token_hex(4)}"
    with explained_refusals(placement):
        job = FollowedTrainJob(TrainJobClient(placement), name)
    with deleted_when_interrupted(job):
        try:
            with explained_refusals(placement):
                job.find_or_create(nodes, command)
            job.follow(placement.timeout_hours * 3600)
        finally:
            job.delete()
