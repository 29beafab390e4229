"""The step `train` where the recipe asks for several nodes.

The step's own pod needs no GPU. It creates the TrainJob, whose pods each run the very command that a
single node would run; it passes on the first node's lines and the job's state, hands failure on, and
removes the job whatever happens. A step that is started again finds its job by name and watches on.
"""

import json
from dataclasses import asdict

from slam_asr.errors import UserError
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe
from slam_asr.stage import FINGERPRINT, Record, follow_pointer, require_record
from slam_asr.storage import digest, exists, is_s3, join
from slam_asr.trainjob.follow import FollowedTrainJob, deleted_when_interrupted
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.request import Trainer, refusals


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
        placement: what each node's pod gets.
        train_manifest: utterances to train on.
        store: folder of all stages' results, which every node can write.
        feature_store: written by extract-features.
        dev_manifest: utterances to validate on.

    Returns:
        The record of `train`, which the first node has written.

    Raises:
        UserError: no Trainer, no right, places that nodes do not share, or the sentence of the node that failed.
    """
    if not is_s3(store):
        raise UserError(
            f"The store is {store}: training over {recipe.training.nodes} nodes needs one in object storage, which all of them see."
        )
    command = command_of(recipe, train_manifest, store, feature_store, dev_manifest)
    name = f"slam-asr-train-{digest([command, asdict(placement)])[:12]}"
    pointer = join(store, "train", "jobs", f"{name}.json")
    command += ["--pointer", pointer]
    with refusals(placement):
        cluster = Trainer(placement)
    job = FollowedTrainJob(cluster, name)
    with deleted_when_interrupted(job):
        with refusals(placement):
            if job.find_or_create(recipe.training.nodes, command):
                log_line(
                    f"TrainJob {name}: {recipe.training.nodes} nodes in the namespace {placement.namespace}"
                )
            else:
                log_line(f"TrainJob {name} is there already: going on with it")
        try:
            job.follow(placement.timeout_hours * 3600)
        finally:
            job.delete()
    if not exists(pointer):
        raise UserError(
            f"TrainJob {name} is complete, but {pointer} is not there: look whether its nodes may write to {store}."
        )
    return require_record(follow_pointer(pointer), "train")


def command_of(
    recipe: Recipe, train_manifest: str, store: str, feature_store: str | None, dev_manifest: str | None
) -> list[str]:
    """What each node runs: the command line of a single one."""
    optional = {"--dev_manifest": dev_manifest, "--feature_store": feature_store}
    given = [part for option, value in optional.items() if value for part in (option, value)]
    text = json.dumps(asdict(recipe), ensure_ascii=False, sort_keys=True)
    return [
        "slam-asr",
        "train",
        "--recipe",
        text,
        "--train_manifest",
        train_manifest,
        *given,
        "--output",
        join(store, "train", FINGERPRINT),
    ]
