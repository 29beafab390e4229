"""Cluster profiles: everything about a cluster that the pipeline, its submission and `doctor` need to know.

A profile is a small YAML file. Those that ship lie in `pipelines/clusters/` and go by their name; any
other goes by its path. Keys are checked like a recipe's. No profile holds a credential: it names the
Kubernetes secrets that do.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from components import RESULTS
from slam_asr.configuration import nearest, parse_yaml, typed
from slam_asr.errors import UserError

FOLDER = Path(__file__).parent / "clusters"


@dataclass
class Images:
    """Where the steps' images are pulled from."""

    names: str = "slam-asr/{stage}:{version}"
    """The images' names, with {stage} and {version}; or the file of digests that `make images` wrote, which pins them."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node asks the registry again. Tags are best never moved; then IfNotPresent is right."""
    pull_secrets: list[str] = field(default_factory=list)
    """Names of secrets of the kind kubernetes.io/dockerconfigjson, for a registry that asks who pulls."""


@dataclass
class Storage:
    """The object storage that keeps all results."""

    store: str = ""
    """s3:// prefix for the results of all stages: the default of the pipeline's parameter `store`."""
    secret: str = "slam-asr-s3"
    """Name of the secret with `accesskey` and `secretkey` (or AWS's own names), mounted as files. Empty: the pod's own role is used."""
    endpoint: str = ""
    """Address of a server that is not AWS's own, such as http://seaweedfs.kubeflow:9000."""
    region: str = ""
    """The bucket's region; empty where the server has none."""


@dataclass
class Models:
    """Where the steps find the frozen models."""

    claim: str = ""
    """Name of a PersistentVolumeClaim that keeps downloaded models for all steps and runs. Empty: each step fetches them into its own scratch space."""
    token_secret: str = ""
    """Name of the secret with HF_TOKEN, for models that the hub gives only to those who accepted a licence."""
    offline: bool = False
    """Never ask the hub: models come from the claim, or are named by folder or s3:// prefix."""


@dataclass
class Queue:
    """Kueue, where the cluster has it."""

    name: str = ""
    """The LocalQueue in which the pods wait for room. Empty: Kueue is not used."""
    priority: str = ""
    """Name of a WorkloadPriorityClass."""


@dataclass
class Trainer:
    """Kubeflow Trainer, which trains over several nodes where the recipe's training.nodes asks for it."""

    runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime that starts one launcher a node."""
    timeout_hours: float = 24.0 * 14
    """How long a training may take, its waiting in a queue included."""


@dataclass
class StepSettings:
    """What one step's pod gets."""

    cpu: str = "2"
    """Cores, asked for and at most, as Kubernetes writes them: 2 or 500m."""
    memory: str = "8Gi"
    """Memory, asked for and at most; shared memory and, without a disk of its own, nothing else counts against it."""
    gpus: int = 0
    """GPUs. In `train` with several nodes: of each node."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the cluster counts its GPUs."""
    gpus_per_node: int = 0
    """GPUs that one such node of the cluster has; a step that asks for more is refused. 0: not known."""
    shared_memory: str = ""
    """Size of /dev/shm, through which worker processes and NCCL exchange data; it counts against memory. Empty: the runtime's 64 MB."""
    scratch: str = "20Gi"
    """Local disk for the cache of models and shards."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: list[dict[str, str]] = field(default_factory=list)
    """Taints that the step puts up with: {key, operator, value, effect}."""
    retries: int = 3
    """How often a step that failed, was preempted or lost its node is started again. It goes on where it was."""
    retry_after: str = "30s"
    """Wait before the first of them; each later one waits twice as long, an hour at most."""
    timeout_hours: float = 24.0
    """Hours after which a step that still runs is ended. 0: never."""
    labels: dict[str, str] = field(default_factory=dict)
    """More labels of the pod."""
    annotations: dict[str, str] = field(default_factory=dict)
    """Annotations of the pod."""


_AS = {
    "open-model": "convert-checkpoint",
    "plan-sweep": "score",
    "vary-recipe": "score",
    "compare-runs": "score",
}
"""Steps without settings of their own: each gets what another one gets, which needs as little."""


@dataclass
class Steps:
    """Each step's pod; underscores stand for the dashes of the steps' names."""

    build_manifest: StepSettings = field(default_factory=StepSettings)
    extract_features: StepSettings = field(default_factory=StepSettings)
    train: StepSettings = field(default_factory=StepSettings)
    convert_checkpoint: StepSettings = field(default_factory=StepSettings)
    decode: StepSettings = field(default_factory=StepSettings)
    score: StepSettings = field(default_factory=StepSettings)

    def __getitem__(self, stage: str) -> StepSettings:
        stage = _AS.get(stage, stage)
        return getattr(self, stage.replace("-", "_"))


@dataclass
class Cluster:
    """A cluster, as the pipeline sees it."""

    name: str = "custom"
    """Shown in messages."""
    description: str = ""
    """What the profile is for."""
    endpoint: str = ""
    """Address of Kubeflow Pipelines, such as https://kubeflow.example/pipeline; `--endpoint` and KF_PIPELINES_ENDPOINT come first."""
    namespace: str = "slam-asr"
    """The namespace in which runs run: the user's profile in a multi-user Kubeflow."""
    service_account: str = "slam-asr-runner"
    """The account of the steps' pods."""
    run_as_user: int = 1000
    """User id in the pods; the images' own user. Never 0."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment of all steps, such as HTTPS_PROXY or NCCL_SOCKET_IFNAME. Nothing secret: it is written into the compiled pipeline."""
    images: Images = field(default_factory=Images)
    storage: Storage = field(default_factory=Storage)
    models: Models = field(default_factory=Models)
    queue: Queue = field(default_factory=Queue)
    trainer: Trainer = field(default_factory=Trainer)
    steps: Steps = field(default_factory=Steps)

    def __post_init__(self) -> None:
        for key in ("namespace", "service_account"):
            _require(
                re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", getattr(self, key)),
                self,
                key,
                getattr(self, key),
                "lower-case letters, digits and dashes",
            )
        _require(
            self.run_as_user > 0, self, "run_as_user", self.run_as_user, "above 0: steps do not run as root"
        )
        store = self.storage.store
        _require(not store or store.startswith("s3://"), self, "storage.store", store, "an s3:// prefix")
        if address := self.storage.endpoint:
            _require(
                re.fullmatch(r"https?://[^/@\s]+/?", address),
                self,
                "storage.endpoint",
                _hidden(address),
                "http://host:port or https://host, without a name or password in it",
            )
        for name in self.environment:
            if re.search(r"(SECRET_ACCESS|SECRET_KEY|ACCESS_KEY|PASSWORD|TOKEN)", name.upper()):
                raise UserError(
                    f"Cluster {self.name}: environment.{name} looks like a credential, and would stand in the compiled pipeline: "
                    "put it into a secret (storage.secret, models.token_secret) instead."
                )
        for stage in RESULTS:
            self._check_step(stage)

    def _check_step(self, stage: str) -> None:
        step, prefix = self.steps[stage], f"steps.{stage.replace('-', '_')}"
        _require(_CPU.fullmatch(step.cpu), self, f"{prefix}.cpu", step.cpu, "cores such as 2 or 500m")
        for key in ("memory", "shared_memory", "scratch"):
            size = getattr(step, key)
            _require(
                _SIZE.fullmatch(size) or (not size and key != "memory"),
                self,
                f"{prefix}.{key}",
                size,
                "a size such as 16Gi",
            )
        _require(
            step.retry_after and _SECONDS.fullmatch(step.retry_after),
            self,
            f"{prefix}.retry_after",
            step.retry_after,
            "a time such as 30s, 5m or 1h",
        )
        for key in ("gpus", "gpus_per_node", "retries", "timeout_hours"):
            _require(getattr(step, key) >= 0, self, f"{prefix}.{key}", getattr(step, key), "0 or more")
        if step.gpus_per_node and step.gpus > step.gpus_per_node:
            raise UserError(
                f"Cluster {self.name}: {prefix}.gpus is {step.gpus}, but a node has {step.gpus_per_node} ({prefix}.gpus_per_node), so that the "
                "pod would wait forever: lower it, or train over several nodes with the recipe's training.nodes."
            )
        if step.shared_memory and size_in_bytes(step.shared_memory) >= size_in_bytes(step.memory):
            raise UserError(
                f"Cluster {self.name}: {prefix}.shared_memory ({step.shared_memory}) counts against {prefix}.memory ({step.memory}) and leaves "
                "nothing of it: raise memory, or lower shared_memory."
            )
        for taint in step.tolerations:
            unknown = [key for key in taint if key not in ("key", "operator", "value", "effect")]
            if unknown:
                raise UserError(
                    f"Cluster {self.name}: {prefix}.tolerations has an unknown key {unknown[0]}{nearest(unknown[0], ['key', 'operator', 'value', 'effect']) or '.'}"
                )


_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_SIZE = re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|K|M|G|T)?")
_SECONDS = re.compile(r"\d+[smh]")
_UNITS = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def size_in_bytes(size: str) -> float:
    """`16Gi` → 17179869184, as Kubernetes reads sizes."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", size).groups()
    return float(number) * _UNITS[unit]


def shipped_clusters() -> dict[str, Path]:
    """The profiles that ship, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_cluster(source: str) -> Cluster:
    """A cluster profile by shipped name or file.

    Raises:
        UserError: no such profile, an unknown key, a wrong type, or values that contradict.
    """
    shipped = shipped_clusters()
    if source not in shipped and not os.path.isfile(source):
        hint = nearest(source, list(shipped)) or "."
        raise UserError(
            f"No cluster profile named {source}, and no such file{hint} Shipped profiles: {', '.join(shipped)}."
        )
    where = f"Cluster {source}"
    values = parse_yaml((shipped.get(source) or Path(source)).read_bytes(), where, "namespace:")
    return typed({"name": Path(source).stem} | values, Cluster, where)


def _require(holds: object, cluster: Cluster, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"Cluster {cluster.name}: {key} is {value!r} but must be {wanted}.")


def _hidden(address: str) -> str:
    return re.sub(r"//[^/]*@", "//…@", address)
