"""Cluster profiles describe what compiling, submitting and `doctor` need to know about a cluster.

A profile is a small YAML file. The shipped profiles are in `pipelines/clusters/` and are selected by name;
any other profile is selected by its path. Keys are checked like those of a recipe. A profile contains no
credentials: it names the Kubernetes secrets that contain them.
"""

import itertools
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.quantities import CPU, DURATION, SIZE, cores, size_in_bytes
from slam_asr.artifacts.costs import Prices
from slam_asr.config.schema import nearest, parse_yaml, problems_of_address, typed
from slam_asr.errors import ConfigurationError
from slam_asr.steps import STEPS
from slam_asr.storage import is_s3
from slam_asr.trainjob.placement import NO_LIMIT

FOLDER = Path(__file__).parent / "clusters"


@dataclass
class Images:
    """Where the nodes pull the images of the steps from."""

    names: str = "slam-asr/{stage}:{version}"
    """Template for image names with {stage} and {version}, or the file that `make images` writes."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls an image again. IfNotPresent is right as long as no tag is ever moved."""
    pull_secrets: list[str] = field(default_factory=list)
    """Names of secrets of type kubernetes.io/dockerconfigjson, for a registry that requires a login."""


@dataclass
class Storage:
    """The object storage for all results."""

    store: str = ""
    """s3:// prefix for the results of all stages: the default of the pipeline parameter `store`."""
    secret: str = "slam-asr-s3"
    """Name of the secret with `accesskey` and `secretkey` (or AWS's own names), mounted as files.

    If empty, the pod's own role is used.
    """
    endpoint: str = ""
    """Address of an S3 server other than AWS, such as http://seaweedfs.kubeflow:9000."""
    region: str = ""
    """Region of the bucket; empty if the server has no regions."""


@dataclass
class Models:
    """Where the steps get the frozen encoder and LLM from."""

    claim: str = ""
    """Name of a PersistentVolumeClaim that caches downloaded models for all steps and runs.

    If empty, each step downloads them into its own scratch space.
    """
    token_secret: str = ""
    """Name of the secret with HF_TOKEN, for models whose licence has to be accepted on the hub."""
    offline: bool = False
    """Never access the hub: models come from the claim, or the recipe names a folder or s3:// prefix."""


@dataclass
class Registry:
    """The model registry, for recipes with `publish.registry`. Its address is a variable in `environment`."""

    secret: str = ""
    """Name of the secret with MODEL_REGISTRY_TOKEN, or with what MLflow's server needs:
    MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

    If empty, Kubeflow's registry gets the token of the pod's service account.
    """


@dataclass
class Queue:
    """Job queueing with Kueue."""

    name: str = ""
    """LocalQueue in which pods wait for free resources. If empty, Kueue is not used."""
    priority: str = ""
    """Name of a WorkloadPriorityClass; a higher class is admitted first."""


@dataclass
class Trainer:
    """Kubeflow Trainer, used if the recipe's training.nodes is above 1."""

    runtime: str = "torch-distributed"
    """Name of a TrainingRuntime of the namespace, or else of a ClusterTrainingRuntime."""
    timeout_hours: float = 24.0 * 14
    """Time limit in hours of one attempt at a multi-node training, including its time in a queue. For such a
    training, it replaces steps.train.timeout_hours. 0: no limit."""


@dataclass
class OnExit:
    """A message to a webhook when a run has ended, also if it failed."""

    format: Literal["", "slack", "cloudevents"] = ""
    """`slack`: JSON that Slack and other chat services accept. `cloudevents`: a CloudEvent 1.0 in JSON. If
    empty, no message is sent."""
    secret: str = "slam-asr-webhook"
    """Name of the secret with the webhook's URL, in the namespace of the runs."""
    key: str = "url"
    """Key of the URL in that secret."""
    dashboard: str = ""
    """Address of the dashboard, for the link in the message. If empty, `endpoint` is used."""


@dataclass
class StepSettings:
    """Resources, placement and retries of one step's pod."""

    cpu: str = "2"
    """CPU cores that a node reserves for the step, in Kubernetes notation: 2 or 500m."""
    cpu_limit: str = ""
    """CPU cores that the step may use at most. Empty: as many as `cpu`. `none`: all free cores of its node,
    for clusters that forbid throttling; a default limit of the namespace's LimitRange still applies."""
    memory: str = "8Gi"
    """Memory, both request and limit. shared_memory counts against it."""
    gpus: int = 0
    """Number of GPUs. For a multi-node `train`: GPUs per node."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes resource name of the cluster's GPUs."""
    gpus_per_node: int = 0
    """GPUs in one node of the cluster; a profile whose step requests more is rejected. 0: unknown."""
    shared_memory: str = ""
    """Size of /dev/shm, through which NCCL exchanges data between GPUs of a node; it counts against memory.

    If empty, the container runtime's default of 64 MB applies.
    """
    scratch: str = "20Gi"
    """Size of the local disk for cached models and feature shards."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have to run the step."""
    tolerations: list[dict[str, str]] = field(default_factory=list)
    """Node taints that the step tolerates: {key, operator, value, effect}."""
    retries: int = 3
    """Maximum number of restarts of a step; each resumes the work.

    Kubeflow's own Argo configuration decides which failures are retried. Kubeflow Pipelines 2.17.0 and later
    retry lost, drained and preempted pods (OnError). Earlier versions retry failing exit codes, lack of
    memory and evictions (OnFailure).
    """
    retry_after: str = "30s"
    """Wait before the first retry; it doubles with each retry."""
    timeout_hours: float = 24.0
    """Hours after which one attempt at the step is stopped. 0: never.

    Each retry has this time again, so a step may take (retries + 1) times as long, plus the waits between.
    """
    labels: dict[str, str] = field(default_factory=dict)
    """Additional labels of the pod."""
    annotations: dict[str, str] = field(default_factory=dict)
    """Annotations of the pod."""


def _key(step: str) -> str:
    """Return a step's key in a profile: underscores replace the dashes of its name."""
    return step.replace("-", "_")


def _with_a_field_for_each_step(kind: type) -> type:
    """Turn a class into a dataclass with a field for each step that has settings of its own.

    The fields come from the table of steps, so that a new step gets its settings without a change here.
    """
    keys = [_key(name) for name, step in STEPS.items() if not step.settings_of]
    # `dataclass` takes the fields and their order from the annotations.
    kind.__annotations__ = dict.fromkeys(keys, StepSettings)
    for key in keys:
        setattr(kind, key, field(default_factory=StepSettings))
    return dataclass(kind)


@_with_a_field_for_each_step
class Steps:
    """Settings of each step's pod; underscores replace the dashes of the step names."""

    def __getitem__(self, step: str) -> StepSettings:
        settings: StepSettings = getattr(self, _key(STEPS[step].settings_of or step))
        return settings


@dataclass
class Cluster:
    """A cluster profile."""

    name: str = "custom"
    """Name shown in messages."""
    description: str = ""
    """What the profile is for, in one line."""
    endpoint: str = ""
    """Address of Kubeflow Pipelines, such as https://kubeflow.example/pipeline.

    `--endpoint` and KF_PIPELINES_ENDPOINT override it.
    """
    namespace: str = "slam-asr"
    """Namespace of the runs in a multi-user Kubeflow: the user's profile namespace."""
    kubeflow_namespace: str = "kubeflow"
    """Namespace of Kubeflow itself. A single-user Kubeflow runs everything there."""
    service_account: str = "slam-asr-runner"
    """Service account of the steps' pods."""
    run_as_user: int = 1000
    """User id in the pods, by default the user of the images. Must not be 0 (root)."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of all steps, such as HTTPS_PROXY or NCCL_SOCKET_IFNAME.

    They are readable in the compiled pipeline, so they must not contain secrets.
    """
    images: Images = field(default_factory=Images)
    storage: Storage = field(default_factory=Storage)
    models: Models = field(default_factory=Models)
    registry: Registry = field(default_factory=Registry)
    queue: Queue = field(default_factory=Queue)
    trainer: Trainer = field(default_factory=Trainer)
    on_exit: OnExit = field(default_factory=OnExit)
    prices: Prices = field(default_factory=Prices)
    steps: Steps = field(default_factory=Steps)

    @property
    def names_registry(self) -> bool:
        """Whether the profile names a model registry.

        MLFLOW_TRACKING_URI does not count, because it may be for the tracker alone.
        """
        variables = {"MODEL_REGISTRY_URL", "MLFLOW_REGISTRY_URI"}
        return bool(self.registry.secret or variables & self.environment.keys())

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigurationError(f"Cluster {self.name}: {problem}")

    def _problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of bounds or contradicts another one."""
        for key in ("namespace", "kubeflow_namespace", "service_account"):
            yield from self._unless(key, _NAME.fullmatch, "lower-case letters, digits and dashes")
        yield from self._unless("run_as_user", lambda user: user > 0, "above 0: steps do not run as root")
        yield from problems_of_address("storage.store", self.storage.store)
        yield from self._unless("storage.store", lambda store: not store or is_s3(store), "an s3:// prefix")
        expected = "http://host:port or https://host, without a name or password in it"
        yield from self._unless("storage.endpoint", _ADDRESS.fullmatch, expected)
        for key in ("prices.gpu_hour", "prices.cpu_hour"):
            yield from self._unless(key, lambda price: 0 <= price < math.inf, "0 or more")
        for key in ("secret", "key"):
            if not _SECRET.fullmatch(getattr(self.on_exit, key)):
                # The value may be the URL itself, so it is not shown.
                yield (
                    f"on_exit.{key} must be a name of letters, digits, dots and dashes: "
                    "put the webhook's URL into a secret, and name that secret and its key here."
                )
        for name in self.environment:
            if re.search(r"(SECRET_ACCESS|SECRET_KEY|ACCESS_KEY|PASSWORD|TOKEN)", name.upper()):
                yield (
                    f"environment.{name} looks like a credential, and would be readable in the compiled "
                    "pipeline: put it into a secret (storage.secret, models.token_secret, registry.secret) "
                    "instead."
                )
        yield from self._unless("trainer.timeout_hours", lambda hours: hours >= 0, "0 or more")
        for name, step in STEPS.items():
            if not step.settings_of:
                yield from self._problems_of_step(f"steps.{_key(name)}", self.steps[name])

    def _problems_of_step(self, prefix: str, step: StepSettings) -> Iterator[str]:
        yield from self._unless(f"{prefix}.cpu", CPU.fullmatch, "cores such as 2 or 500m")
        yield from self._unless(
            f"{prefix}.cpu_limit",
            lambda limit: (
                # Kubernetes refuses a limit below the request.
                limit in ("", NO_LIMIT) or (CPU.fullmatch(limit) and cores(limit) >= cores(step.cpu))
            ),
            f"{NO_LIMIT}, or cores such as 2 or 500m, not fewer than {prefix}.cpu ({step.cpu})",
        )
        yield from self._unless(f"{prefix}.memory", SIZE.fullmatch, "a size such as 16Gi")
        for key in ("shared_memory", "scratch"):
            yield from self._unless(
                f"{prefix}.{key}", lambda size: not size or SIZE.fullmatch(size), "a size such as 16Gi"
            )
        yield from self._unless(f"{prefix}.retry_after", DURATION.fullmatch, "a time such as 30s, 5m or 1h")
        for key in ("gpus", "gpus_per_node", "retries", "timeout_hours"):
            yield from self._unless(f"{prefix}.{key}", lambda number: number >= 0, "0 or more")
        if step.gpus_per_node and step.gpus > step.gpus_per_node:
            yield (
                f"{prefix}.gpus is {step.gpus}, but a node has {step.gpus_per_node} "
                f"({prefix}.gpus_per_node), so the pod would wait forever: lower {prefix}.gpus, or train on "
                "several nodes with the recipe's training.nodes."
            )
        if step.shared_memory and size_in_bytes(step.shared_memory) >= size_in_bytes(step.memory):
            yield (
                f"{prefix}.shared_memory ({step.shared_memory}) counts against "
                f"{prefix}.memory ({step.memory}) and uses all of it: raise memory, or lower shared_memory."
            )
        for key in itertools.chain(*step.tolerations):
            if key not in _TOLERATION_KEYS:
                hint = nearest(key, _TOLERATION_KEYS) or "."
                yield f"{prefix}.tolerations has an unknown key {key}{hint}"

    def _unless(self, key: str, holds: Callable[[Any], object], expected: str) -> Iterator[str]:
        """Yield a sentence about a key, such as `storage.store`, unless `holds(value)` is true."""
        value = operator.attrgetter(key)(self)
        if not holds(value):
            # An address may contain a password.
            shown = re.sub(r"//[^/]*@", "//…@", repr(value))
            yield f"{key} is {shown} but must be {expected}."


_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SECRET = re.compile(r"[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?")
_ADDRESS = re.compile(r"(https?://[^/@\s]+/?)?")
"""An object storage's endpoint; empty for AWS."""
_TOLERATION_KEYS = ["key", "operator", "value", "effect"]


def shipped_clusters() -> dict[str, Path]:
    """Return the file of each shipped profile, keyed by the profile's name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_cluster(source: str) -> Cluster:
    """Load and check a cluster profile.

    Args:
        source: name of a shipped profile, or path of a YAML file.

    Raises:
        ConfigurationError: the profile does not exist or is not valid YAML, a key is unknown, a value has the
            wrong type or is out of bounds, or values contradict each other.
    """
    shipped = shipped_clusters()
    if source not in shipped and not os.path.isfile(source):
        hint = nearest(source, list(shipped)) or "."
        raise ConfigurationError(
            f"No cluster profile named {source}, and no such file{hint} "
            f"Shipped profiles: {', '.join(shipped)}."
        )
    where = f"Cluster {source}"
    values = parse_yaml((shipped.get(source) or Path(source)).read_bytes(), where, "namespace:")
    # A profile without a name gets the name of its file.
    return typed({"name": Path(source).stem} | values, Cluster, where)
