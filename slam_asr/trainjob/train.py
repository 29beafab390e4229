"""Run the step `train` on several nodes, as a TrainJob.

The step's own pod needs no GPU. It creates the TrainJob, and each of the job's pods runs the same command as
a training run on a single node. The step logs the first node's output and the job's state, fails if the job
fails, and deletes the job at the end. If the step is killed before it can delete the job, its next attempt
finds the job by name and continues to follow it, unless the job has failed.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from slam_asr.artifacts.stage_record import FINGERPRINT, Record, follow_pointer, require_record
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.progress import log_line
from slam_asr.storage import digest, exists, is_s3, join
from slam_asr.trainjob.follow import FollowedTrainJob, deleted_when_interrupted
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.request import TrainJobClient, explained_refusals

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""File in which a pod finds its namespace."""


def train_on_nodes(
    recipe: Recipe,
    placement: Placement,
    train_manifest: str,
    store: str,
    feature_store: str | None = None,
    dev_manifest: str | None = None,
) -> Record:
    """Train on `training.nodes` machines, as a TrainJob.

    Args:
        recipe: models and hyper-parameters.
        placement: settings for each node's pod.
        train_manifest: manifest of the utterances to train on.
        store: s3:// prefix for the results of all stages.
        feature_store: feature store that extract-features wrote, if any.
        dev_manifest: manifest of the utterances to validate on, if any.

    Returns:
        The record of `train`, written by the first node.

    Raises:
        ConfigurationError: the store is not in object storage.
        ClusterError: Kubeflow Trainer is not installed or refuses the job, Kubernetes does not answer, the
            job was deleted or takes too long, or the nodes wrote no pointer into the store.
        UserError: training failed. The message is that of the failed node.
    """
    if not is_s3(store):
        raise ConfigurationError(
            f"The store is {store}, but training on {recipe.training.nodes} nodes needs a store in object "
            "storage, which all nodes can reach: choose an s3:// prefix."
        )
    placement = in_this_namespace(placement)
    command = node_command(recipe, train_manifest, store, feature_store, dev_manifest)
    # The name is a digest of everything that defines the job, so a restarted step finds its own job.
    name = f"slam-asr-train-{digest([command, asdict(placement)])[:12]}"
    # The nodes' pods share no volume with this pod, so the first node writes a pointer into the store.
    pointer = join(store, "train", "jobs", f"{name}.json")
    command += ["--pointer", pointer]
    with explained_refusals(placement):
        job, started = FollowedTrainJob(TrainJobClient(placement), name), time.time()
    with deleted_when_interrupted(job):
        with explained_refusals(placement):
            is_new = job.find_or_create(recipe.training.nodes, command)
        created = f"TrainJob {name}: {recipe.training.nodes} nodes in the namespace {placement.namespace}"
        log_line(created if is_new else f"TrainJob {name} exists already: following it")
        try:
            job.follow(placement.timeout_hours * 3600)
        finally:
            job.delete()
    if not exists(pointer):
        raise ClusterError(
            f"TrainJob {name} is complete, but {pointer} does not exist: check that its nodes may write "
            "there."
        )
    record = require_record(follow_pointer(pointer), "train")
    return replace(record, reused=record.finished < started)


def in_this_namespace(placement: Placement) -> Placement:
    """Return the settings with the namespace in which this pod runs. Outside a pod, nothing changes.

    A single-user Kubeflow runs everything in its own namespace, whatever the profile says. The service
    account, the secrets and the volumes are in that namespace. The job's owner is there too, and a job must
    be in the namespace of its owner.
    """
    try:
        here = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return placement
    if here != placement.namespace:
        log_line(
            f"the TrainJob is created in {here}, where this step runs, and not in the profile's namespace "
            f"{placement.namespace}"
        )
    return replace(placement, namespace=here)


def node_command(
    recipe: Recipe, train_manifest: str, store: str, feature_store: str | None, dev_manifest: str | None
) -> list[str]:
    """Return the command that each node runs, which is the same as for a training run on a single node."""
    options = {
        # The recipe's content, not its name, because the nodes' pods cannot read the files of this pod. The
        # keys are sorted, because the job's name is a digest of this command.
        "--recipe": json.dumps(asdict(recipe), ensure_ascii=False, sort_keys=True),
        "--train-manifest": train_manifest,
        "--dev-manifest": dev_manifest,
        "--feature-store": feature_store,
        "--output": join(store, "train", FINGERPRINT),
    }
    given = {option: value for option, value in options.items() if value}
    return ["slam-asr", "train", *(part for pair in given.items() for part in pair)]
