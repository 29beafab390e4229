"""Checks from inside a pod what a step needs: image, host names, storage, model volume, GPUs, other nodes.

`python -m pipelines doctor --run` starts this program in a small pod for each kind of step, with that step's
image, account, secrets and node. In a container of one of the images, it can also be started by hand:

    python -m slam_asr.stages.check_pod '{"step": "train", "store": "s3://bucket/runs", "gpus": 1}'
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from slam_asr import __version__
from slam_asr.errors import ClusterError, ConfigurationError, UserError, exit_on_user_error
from slam_asr.findings import BAD, GOOD, Finding
from slam_asr.progress import log_line
from slam_asr.runtime.pod_checks import check_folder, check_gpus, check_name, check_store, storage_address
from slam_asr.storage import is_s3
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.retry import PATIENCE
from slam_asr.version import source_digest

_STORAGE_PATIENCE = "20"
"""Seconds for which the store may fail here. A stage tries for longer, but a check must end soon."""
_JOIN_TIMEOUT = timedelta(minutes=5)
"""Time for which a node waits for the others, which may still be pulling their image."""


@dataclass(frozen=True)
class PodCheck:
    """What to check in a pod. An empty value leaves a check out."""

    step: str
    namespace: str = "default"
    version: str = ""
    """`slam_asr.__version__` of the submitter."""
    source: str = ""
    """The submitter's `source_digest`."""
    store: str = ""
    secret: str = ""
    """Name of the secret with the store's credentials, for messages."""
    claim: str = ""
    """Name of the PersistentVolumeClaim that is mounted for models."""
    hub: bool = False
    """Whether the step downloads models from the hub."""
    gpus: int = 0
    nodes: int = 1
    """Number of pods of the TrainJob."""
    trainjob: str = ""
    """`Placement`, in JSON, of the TrainJob that this pod starts."""
    in_trainjob: bool = False
    """Whether this pod is one of the TrainJob's."""


def check_pod(request: str) -> list[Finding]:
    """Run all checks, and print each finding as soon as it is known.

    Args:
        request: a `PodCheck` in JSON.

    Raises:
        ConfigurationError: the request is not a `PodCheck`.
    """
    try:
        check = PodCheck(**json.loads(request))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The request is not the JSON of a PodCheck ({error}): see slam_asr/stages/check_pod.py."
        ) from None
    # This is only a default: the profile's environment may set another time.
    os.environ.setdefault(PATIENCE, _STORAGE_PATIENCE)
    findings = []
    for finding in examine(check):
        findings.append(finding)
        log_line(finding.line())
    return findings


def examine(check: PodCheck) -> Iterator[Finding]:
    """Yield the finding of each requested check."""
    if check.version:
        yield _check_version(check)
    if check.store:
        yield from _check_store(check)
    if check.hub:
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        remedy = "copy the models with `slam-asr copy-models` and set models.offline in the profile"
        yield check_name(hub, "the model hub", remedy)
    if check.claim:
        folder, pvc = cache_folder() / "models", f"pvc {check.claim}"
        yield check_folder(
            folder,
            f"model volume {check.claim}",
            f"`kubectl -n {check.namespace} describe {pvc}` shows its size and access modes",
            # kfp-kubernetes cannot set fsGroup, with which Kubernetes would change the owner by itself.
            f"run `chmod 1777 {folder}` once, in a pod that runs as root and mounts the claim",
        )
    # A pod that starts a TrainJob has no GPU itself.
    if check.gpus and not check.trainjob:
        yield check_gpus(check.gpus, f"steps.{check.step.replace('-', '_')}")
    if check.trainjob:
        yield _check_trainjob(check)
    if check.in_trainjob:
        yield _meet_other_nodes(check)


def _check_version(check: PodCheck) -> Finding:
    if __version__ != check.version:
        found = f"slam_asr {__version__}, but you submit with {check.version}"
    elif source_digest() != check.source:
        found = f"slam_asr {__version__} with other source code than the checkout that you submit from"
    else:
        return Finding(GOOD, "image", f"was pulled, and has your version of slam_asr, {__version__}")
    return Finding(
        BAD,
        "image",
        f"has {found}: build and push the images from that checkout (`make images REGISTRY=… TAG=… PUSH=1`), "
        "and give doctor the same --images.",
    )


def _check_store(check: PodCheck) -> Iterator[Finding]:
    if is_s3(check.store) and (address := storage_address()):
        name = check_name(address, "object storage", "correct storage.endpoint in the profile")
        yield name
        # If the host name has no address, every request would fail as well, after all of its retries.
        if name.sign == BAD:
            return
    remedy = "the profile has no storage.secret, so the pod's account needs a role that may use the bucket"
    if check.secret:
        create = (
            f"kubectl -n {check.namespace} create secret generic {check.secret} --from-literal=accesskey=… "
            "--from-literal=secretkey=… --dry-run=client -o yaml | kubectl apply -f -"
        )
        remedy = f"this pod uses the keys in the secret {check.secret}, which `{create}` replaces"
    yield check_store(check.store, remedy)


def _check_trainjob(check: PodCheck) -> Finding:
    """Start a TrainJob whose pods run this program too, and connect to each other."""
    from slam_asr.trainjob.nodes_check import run_on_nodes
    from slam_asr.trainjob.placement import Placement
    from slam_asr.trainjob.train import in_this_namespace

    placement = in_this_namespace(Placement(**json.loads(check.trainjob)))
    node = replace(check, namespace=placement.namespace, trainjob="", in_trainjob=True)
    subject = f"{check.nodes} nodes"
    try:
        command = ["python", "-m", "slam_asr.stages.check_pod", json.dumps(asdict(node))]
        run_on_nodes(placement, check.nodes, command)
    except UserError as error:
        return Finding(BAD, subject, str(error))
    return Finding(GOOD, subject, f"a TrainJob in {placement.namespace} ran, and its pods reach each other")


def _meet_other_nodes(check: PodCheck) -> Finding:
    """Sum a number over all nodes of the TrainJob with torch.distributed, which a training run uses too."""
    # Imported here, because the images of some steps have no torch.
    import torch
    from torch import distributed

    from slam_asr.training.launch import nodes_from_environment

    nodes = nodes_from_environment(check.nodes)
    subject, address = f"node {nodes.rank}", f"{nodes.address}:{nodes.port}"
    backend, device = ("nccl", "cuda:0") if check.gpus and torch.cuda.is_available() else ("gloo", "cpu")
    try:
        # Node 0 listens at `address`, so a wrong host name shows here; NCCL's own connections are made by the
        # sum.
        distributed.init_process_group(
            backend, f"tcp://{address}", timeout=_JOIN_TIMEOUT, world_size=nodes.number, rank=nodes.rank
        )
        # A sum rather than a barrier: its result is the number of nodes that took part.
        total = torch.ones(1, device=device)
        distributed.all_reduce(total)
        distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        return Finding(
            BAD,
            subject,
            f"does not reach the other nodes through {address} with {backend} ({reason}): allow all ports "
            f"between pods in {check.namespace} (`kubectl get networkpolicy`), and name the network that "
            "connects them in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME of the profile's environment.",
        )
    others = round(total.item()) - 1
    nodes_reached = f"{others} other node{'s' * (others != 1)}"
    return Finding(GOOD, subject, f"reaches {nodes_reached} through {address} with {backend}")


def main(arguments: list[str]) -> None:
    """Run the checks that the only argument requests; problems end the program with one line and code 2."""
    with exit_on_user_error():
        if len(arguments) != 1:
            raise ConfigurationError("One argument is needed: the JSON of a PodCheck.")
        if problems := [finding for finding in check_pod(arguments[0]) if finding.sign == BAD]:
            raise ClusterError("; ".join(f"{p.subject}: {p.detail.rstrip('.')}" for p in problems) + ".")


if __name__ == "__main__":
    main(sys.argv[1:])
