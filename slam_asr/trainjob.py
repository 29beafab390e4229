"""Training over several nodes: a TrainJob of Kubeflow Trainer, started and watched by the step `train`.

The step's own pod needs no GPU. It creates the TrainJob, whose pods each run the very command that a
single node would run; it passes on the first node's lines and the job's state, hands failure on, and
removes the job whatever happens. A step that is started again finds its job by name and watches on.
"""

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from slam_asr.errors import UserError
from slam_asr.progress import say
from slam_asr.recipe import Recipe
from slam_asr.stage import FINGERPRINT, Record, follow_pointer, require_record
from slam_asr.storage import digest, exists, is_s3, join
from slam_asr.storage.client import SECRET_FOLDER

POLL = 5.0
"""Seconds between two looks at the job."""
NODE = "node"
"""The name that Trainer's runtimes give to the replicated job, and to the container, that trains."""
_ERROR = "slam-asr: error: "


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
        raise UserError(f"The store is {store}: training over {recipe.training.nodes} nodes needs one in object storage, which all of them see.")
    command = command_of(recipe, train_manifest, store, feature_store, dev_manifest)
    name = f"slam-asr-train-{digest([command, asdict(placement)])[:12]}"
    pointer = join(store, "train", "jobs", f"{name}.json")
    command += ["--pointer", pointer]
    with _refusals(placement):
        cluster = Trainer(placement)
    job = Job(cluster, name)
    with _deleted_when_interrupted(job):
        with _refusals(placement):
            if job.find_or_create(recipe.training.nodes, command):
                say(f"TrainJob {name}: {recipe.training.nodes} nodes in the namespace {placement.namespace}")
            else:
                say(f"TrainJob {name} is there already: going on with it")
        try:
            job.follow(placement.timeout_hours * 3600)
        finally:
            job.delete()
    if not exists(pointer):
        raise UserError(f"TrainJob {name} is complete, but {pointer} is not there: look whether its nodes may write to {store}.")
    return require_record(follow_pointer(pointer), "train")


def command_of(recipe: Recipe, train_manifest: str, store: str, feature_store: str | None, dev_manifest: str | None) -> list[str]:
    """What each node runs: the command line of a single one."""
    optional = {"--dev_manifest": dev_manifest, "--feature_store": feature_store}
    given = [part for option, value in optional.items() if value for part in (option, value)]
    text = json.dumps(asdict(recipe), ensure_ascii=False, sort_keys=True)
    return ["slam-asr", "train", "--recipe", text, "--train_manifest", train_manifest, *given, "--output", join(store, "train", FINGERPRINT)]


class Trainer:
    """Kubeflow Trainer in one namespace, through its own SDK."""

    def __init__(self, placement: Placement) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        self.placement = placement
        self.client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=placement.namespace))
        # Asked for first: without it nothing is created.
        self.runtime = self.client.get_runtime(placement.runtime)

    def create(self, name: str, nodes: int, command: list[str]) -> None:
        """Create the job."""
        from kubeflow.trainer import CustomTrainerContainer
        from kubeflow.trainer.options import (
            ActiveDeadlineSeconds,
            Annotations,
            Labels,
            Name,
            TrainerArgs,
            TrainerCommand,
        )

        placement = self.placement
        trainer = CustomTrainerContainer(
            image=placement.image, num_nodes=nodes, resources_per_node=placement.resources, env=dict(placement.environment)
        )
        options = [
            Name(name), TrainerCommand(command[:1]), TrainerArgs(command[1:]), patch_of(placement),
            *([Labels(dict(placement.labels))] if placement.labels else []),
            *([ActiveDeadlineSeconds(round(placement.timeout_hours * 3600))] if placement.timeout_hours else []),
            *([Annotations(dict(placement.annotations))] if placement.annotations else []),
        ]  # fmt: skip
        self.client.train(runtime=self.runtime, trainer=trainer, options=options)


def patch_of(placement: Placement) -> Any:
    """What the pods get beyond the runtime's own: volumes, secrets, where they may run, and as whom."""
    from kubeflow.trainer.options import (
        ContainerPatch,
        JobSetSpecPatch,
        JobSetTemplatePatch,
        JobSpecPatch,
        JobTemplatePatch,
        PodSpecPatch,
        PodTemplatePatch,
        ReplicatedJobPatch,
        RuntimePatch,
        TrainingRuntimeSpecPatch,
    )

    volumes: list[tuple[dict[str, Any], str]] = []
    if placement.shared_memory:
        volumes.append(({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": placement.shared_memory}}, "/dev/shm"))
    if placement.scratch:
        volumes.append(({"name": "scratch", "emptyDir": {"sizeLimit": placement.scratch}}, placement.cache))
    if placement.models_claim:
        volumes.append(({"name": "models", "persistentVolumeClaim": {"claimName": placement.models_claim}}, f"{placement.cache}/models"))
    if placement.storage_secret:
        volumes.append(({"name": "s3", "secret": {"secretName": placement.storage_secret}}, SECRET_FOLDER))
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": placement.token_secret, "key": "HF_TOKEN"}}}
    container = ContainerPatch(
        name=NODE,
        env=[token] if placement.token_secret else None,
        volume_mounts=[{"name": volume["name"], "mountPath": path} for volume, path in volumes] or None,
        security_context={"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    )
    user = placement.run_as_user
    pod = PodSpecPatch(
        service_account_name=placement.service_account or None,
        volumes=[volume for volume, _ in volumes] or None,
        containers=[container],
        image_pull_secrets=[{"name": secret} for secret in placement.pull_secrets] or None,
        security_context={
            "runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user, "seccompProfile": {"type": "RuntimeDefault"},
        },
        node_selector=placement.node_selector or None,
        tolerations=placement.tolerations or None,
    )  # fmt: skip
    template = PodTemplatePatch(metadata={"labels": placement.labels} if placement.labels else None, spec=pod)
    replicated = ReplicatedJobPatch(name=NODE, template=JobTemplatePatch(spec=JobSpecPatch(template=template)))
    return RuntimePatch(TrainingRuntimeSpecPatch(JobSetTemplatePatch(spec=JobSetSpecPatch([replicated]))))


class Job:
    """One TrainJob, from its creation to its end."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer, self.name, self.client = trainer, name, trainer.client
        self._heard = 0
        self._told: set[str] = set()

    def find_or_create(self, nodes: int, command: list[str]) -> bool:
        """Go on with a job that an earlier attempt of this step left, or create one → whether it is new."""
        try:
            left = self.client.get_job(self.name)
        except RuntimeError as error:
            if _status_of(error) != 404:
                raise
            left = None
        if left is not None and left.status == "Failed":
            self.client.delete_job(self.name)
            self._until_gone()
            left = None
        if left is None:
            self.trainer.create(self.name, nodes, command)
        return left is None

    def follow(self, seconds: float) -> None:
        """Pass on the first node's lines and what happens to the job, until it is complete.

        Args:
            seconds: after which it is given up; 0: never.

        Raises:
            UserError: it failed, was deleted by somebody, or takes too long.
        """
        started, state, lost = time.monotonic(), "", 0.0
        listening: threading.Thread | None = None
        while True:
            try:
                job, lost = self.client.get_job(self.name), 0.0
            except (RuntimeError, TimeoutError) as error:
                if _status_of(error) == 404:
                    raise UserError(f"TrainJob {self.name} was deleted while it ran: start the step again.") from None
                # The API server may be away for a while; the job goes on without us.
                lost = lost or time.monotonic()
                if time.monotonic() - lost > 600:
                    raise UserError(f"Kubernetes has not answered for 10 minutes ({_cause(error)}): TrainJob {self.name} may go on; start the step again to watch it.") from None
                time.sleep(POLL)
                continue
            if job.status != state:
                state = job.status
                say(f"TrainJob {self.name}: {state.lower()}")
            running = any(step.name == f"{NODE}-0" and step.status not in (None, "Pending") for step in job.steps)
            if running and (listening is None or not listening.is_alive()) and state not in ("Complete", "Failed"):
                listening = threading.Thread(target=self._listen, daemon=True)
                listening.start()
            if not running:
                self._tell_what_it_waits_for()
            if state in ("Complete", "Failed"):
                if listening is not None:
                    listening.join(timeout=10)
                self._hear(follow=False)
                if state == "Failed":
                    raise UserError(self._why())
                return
            if seconds and time.monotonic() - started > seconds:
                raise UserError(f"TrainJob {self.name} has not ended after {seconds / 3600:g} h: raise trainer.timeout_hours in the cluster's profile, or look at what it waits for.")
            time.sleep(POLL)

    def delete(self) -> None:
        """Remove the job with its pods; nothing is said where it is gone already."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.client.delete_job(self.name)

    def _until_gone(self) -> None:
        for _ in range(60):
            try:
                self.client.get_job(self.name)
            except RuntimeError as error:
                if _status_of(error) == 404:
                    return
            time.sleep(POLL / 5)
        raise UserError(f"TrainJob {self.name} of an earlier attempt does not go away: `kubectl -n {self.trainer.placement.namespace} delete trainjob {self.name}`.")

    def _listen(self) -> None:
        # A connection that broke is made again by `follow`, and goes on behind what was heard.
        with contextlib.suppress(Exception):
            self._hear(follow=True)

    def _hear(self, follow: bool) -> None:
        with contextlib.suppress(RuntimeError):
            # The SDK leaves out empty lines when it follows, and only then.
            lines = (line for line in self.client.get_job_logs(self.name, follow=follow, step=f"{NODE}-0") if line.strip())
            for line in itertools.islice(lines, self._heard, None):
                self._heard += 1
                say(line.rstrip("\n"))

    def _tell_what_it_waits_for(self) -> None:
        with contextlib.suppress(Exception):
            for event in self.client.get_job_events(self.name):
                text = " ".join(event.message.split())
                if event.reason in ("FailedScheduling", "Failed", "FailedMount", "BackOff", "FailedCreate") and text not in self._told:
                    self._told.add(text)
                    say(f"TrainJob {self.name} waits: {event.reason}: {text}")

    def _why(self) -> str:
        """The sentence of the node that failed; the other nodes' last lines are passed on."""
        said = None
        nodes = [step for step in self.client.get_job(self.name).steps if step.name.startswith(f"{NODE}-")]
        for step in sorted(nodes, key=lambda step: step.name):
            lines: list[str] = []
            with contextlib.suppress(RuntimeError):
                lines = list(self.client.get_job_logs(self.name, step=step.name))
            if step.name != f"{NODE}-0":
                for line in lines[-10:]:
                    say(f"{step.name}: {line}")
            mistakes = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
            # A process that ends because another one did says only that.
            own = [m for m in mistakes if not m.startswith("A training process ended with code")]
            said = said or next(iter(own), None)
        return said or f"TrainJob {self.name} failed: its nodes' last lines stand above; `kubectl describe` of its pods says more where they were killed."


@contextlib.contextmanager
def _deleted_when_interrupted(job: Job) -> Iterator[None]:
    """Have SIGTERM, with which Kubernetes ends a pod, take the job along: its GPUs would be paid for by nobody."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: deleting TrainJob {job.name}")
        job.delete()
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _refusals(placement: Placement) -> Iterator[None]:
    """What Kubernetes refuses, in a sentence."""
    from kubernetes.config import ConfigException

    try:
        yield
    except ConfigException as error:
        raise UserError(f"The Kubernetes API is not known here ({' '.join(str(error).split()).rstrip('.')}): training over several nodes runs in a cluster.") from None
    except TimeoutError as error:
        raise UserError(f"The Kubernetes API does not answer ({error}): try again.") from None
    except (RuntimeError, ValueError) as error:
        status = _status_of(error)
        if status in (401, 403):
            raise UserError(
                f"The account {placement.service_account or 'of this step'} may not use TrainJobs in {placement.namespace} ({status}): apply the component "
                "manifests/components/trainer."
            ) from None
        if status == 404 or "Runtime" in str(error):
            raise UserError(
                f"The cluster has no training runtime {placement.runtime} ({_cause(error)}): install Kubeflow Trainer 2 with its runtimes, correct "
                "trainer.runtime in the cluster's profile, or set training.nodes to 1."
            ) from None
        raise UserError(f"Kubeflow Trainer refuses the TrainJob ({_cause(error)}).") from None


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of the SDK."""
    while error is not None:
        if isinstance(status := getattr(error, "status", None), int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _cause(error: BaseException) -> str:
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    reason = getattr(inner, "reason", None) or str(inner)
    body = getattr(inner, "body", None)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        reason = json.loads(body)["message"]
    return " ".join(str(reason).split())[:300].rstrip(".")
