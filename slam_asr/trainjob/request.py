"""Request a TrainJob through Kubeflow Trainer's SDK, and explain a refusal in one sentence."""

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from urllib3.exceptions import HTTPError

from slam_asr.errors import ClusterError
from slam_asr.storage.client import SECRET_FOLDER
from slam_asr.trainjob.placement import Placement

if TYPE_CHECKING:
    from kubeflow.trainer.options import RuntimePatch

NODE = "node"
"""Name of the replicated job that trains, and of its container, in Trainer's runtimes."""


class TrainJobClient:
    """A client of Kubeflow Trainer in one namespace, through its SDK.

    Args:
        placement: settings for each node's pod; they include the namespace.
    """

    def __init__(self, placement: Placement) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        self.placement = placement
        self.client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=placement.namespace))
        # Fails here, before anything is created, if the runtime does not exist.
        self.runtime = self.client.get_runtime(placement.runtime)

    def create(self, name: str, nodes: int, command: list[str]) -> None:
        """Create a TrainJob.

        Args:
            name: name of the job.
            nodes: number of pods.
            command: program and arguments that each node runs.
        """
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
            image=placement.image,
            num_nodes=nodes,
            resources_per_node=placement.resources,
            env=dict(placement.environment),
        )
        options: list[Any] = [
            Name(name),
            TrainerCommand(command[:1]),
            TrainerArgs(command[1:]),
            runtime_patch(placement),
        ]
        if placement.labels:
            options.append(Labels(dict(placement.labels)))
        if placement.timeout_hours:
            options.append(ActiveDeadlineSeconds(round(placement.timeout_hours * 3600)))
        if placement.annotations:
            options.append(Annotations(dict(placement.annotations)))
        self.client.train(runtime=self.runtime, trainer=trainer, options=options)


def runtime_patch(placement: Placement) -> "RuntimePatch":
    """Build the changes to the runtime's pods: volumes, secrets, node selection, user and account."""
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

    volumes = _volumes(placement)
    token = {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": placement.token_secret, "key": "HF_TOKEN"}},
    }
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
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        node_selector=placement.node_selector or None,
        tolerations=placement.tolerations or None,
    )
    template = PodTemplatePatch(metadata={"labels": placement.labels} if placement.labels else None, spec=pod)
    replicated = ReplicatedJobPatch(
        name=NODE, template=JobTemplatePatch(spec=JobSpecPatch(template=template))
    )
    return RuntimePatch(TrainingRuntimeSpecPatch(JobSetTemplatePatch(spec=JobSetSpecPatch([replicated]))))


def _volumes(placement: Placement) -> list[tuple[dict[str, Any], str]]:
    """The volumes that the settings ask for, each with the path that it is mounted at."""
    memory = {"medium": "Memory", "sizeLimit": placement.shared_memory}
    claim, secret = {"claimName": placement.models_claim}, {"secretName": placement.storage_secret}
    volumes: list[tuple[str, dict[str, Any], str]] = [
        (placement.shared_memory, {"name": "shm", "emptyDir": memory}, "/dev/shm"),
        (
            placement.scratch,
            {"name": "scratch", "emptyDir": {"sizeLimit": placement.scratch}},
            placement.cache,
        ),
        (
            placement.models_claim,
            {"name": "models", "persistentVolumeClaim": claim},
            f"{placement.cache}/models",
        ),
        (placement.storage_secret, {"name": "s3", "secret": secret}, SECRET_FOLDER),
    ]
    return [(volume, path) for setting, volume, path in volumes if setting]


@contextlib.contextmanager
def explained_refusals(placement: Placement) -> Iterator[None]:
    """Turn exceptions of the SDK into a `ClusterError` whose message says what to do.

    Args:
        placement: names the account, the namespace and the runtime for the message.

    Raises:
        ClusterError: the SDK raised an exception.
    """
    from kubernetes.config import ConfigException

    try:
        yield
    except ConfigException as error:
        raise ClusterError(
            f"No Kubernetes API is configured here ({' '.join(str(error).split()).rstrip('.')}): training "
            "over several nodes runs in a cluster."
        ) from None
    except TimeoutError as error:
        raise ClusterError(f"The Kubernetes API does not answer ({error}): try again.") from None
    except (RuntimeError, ValueError) as error:
        # The SDK wraps the exceptions of its Kubernetes client, so the cause is found only in the chain.
        if any(isinstance(link, HTTPError) for link in _chain(error)):
            raise ClusterError(
                f"The Kubernetes API does not answer ({cause_of(error)}): try again."
            ) from None
        status = status_of(error)
        if status in (401, 403):
            raise ClusterError(
                f"The account {placement.service_account or 'of this step'} may not use TrainJobs in "
                f"{placement.namespace} ({status}): apply the component manifests/components/trainer."
            ) from None
        if status == 404 or "Runtime" in str(error):
            raise ClusterError(
                f"The cluster has no training runtime {placement.runtime} ({cause_of(error)}): install "
                "Kubeflow Trainer 2 with its runtimes, correct trainer.runtime in the cluster's profile, or "
                "set training.nodes to 1."
            ) from None
        raise ClusterError(f"Kubeflow Trainer refuses the TrainJob ({cause_of(error)}).") from None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error of the SDK, or None."""
    statuses = (getattr(link, "status", None) for link in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def cause_of(error: BaseException) -> str:
    """Return the first cause of an error of the SDK, as one line of at most 300 characters."""
    *_, inner = _chain(error)
    reason = getattr(inner, "reason", None) or str(inner)
    # Kubernetes explains a refusal in the JSON body of its answer.
    body: Any = getattr(inner, "body", None)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        reason = json.loads(body)["message"]
    return " ".join(str(reason).split())[:300].rstrip(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
