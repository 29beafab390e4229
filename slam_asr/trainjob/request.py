"""The request for a TrainJob, made with Kubeflow Trainer's own SDK, and what its refusals mean."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from urllib3.exceptions import HTTPError

from slam_asr.errors import UserError
from slam_asr.storage.client import SECRET_FOLDER
from slam_asr.trainjob.placement import Placement

NODE = "node"
"""The name that Trainer's runtimes give to the replicated job, and to the container, that trains."""


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
            image=placement.image,
            num_nodes=nodes,
            resources_per_node=placement.resources,
            env=dict(placement.environment),
        )
        options = [
            Name(name),
            TrainerCommand(command[:1]),
            TrainerArgs(command[1:]),
            patch_of(placement),
            *([Labels(dict(placement.labels))] if placement.labels else []),
            *(
                [ActiveDeadlineSeconds(round(placement.timeout_hours * 3600))]
                if placement.timeout_hours
                else []
            ),
            *([Annotations(dict(placement.annotations))] if placement.annotations else []),
        ]
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
        volumes.append(
            (
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": placement.shared_memory}},
                "/dev/shm",
            )
        )
    if placement.scratch:
        volumes.append(({"name": "scratch", "emptyDir": {"sizeLimit": placement.scratch}}, placement.cache))
    if placement.models_claim:
        volumes.append(
            (
                {"name": "models", "persistentVolumeClaim": {"claimName": placement.models_claim}},
                f"{placement.cache}/models",
            )
        )
    if placement.storage_secret:
        volumes.append(({"name": "s3", "secret": {"secretName": placement.storage_secret}}, SECRET_FOLDER))
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


@contextlib.contextmanager
def refusals(placement: Placement) -> Iterator[None]:
    """What Kubernetes refuses, in a sentence."""
    from kubernetes.config import ConfigException

    try:
        yield
    except ConfigException as error:
        raise UserError(
            f"The Kubernetes API is not known here ({' '.join(str(error).split()).rstrip('.')}): training over several nodes runs in a cluster."
        ) from None
    except TimeoutError as error:
        raise UserError(f"The Kubernetes API does not answer ({error}): try again.") from None
    except (RuntimeError, ValueError) as error:
        if any(isinstance(link, HTTPError) for link in _chain(error)):
            raise UserError(f"The Kubernetes API does not answer ({cause_of(error)}): try again.") from None
        status = status_of(error)
        if status in (401, 403):
            raise UserError(
                f"The account {placement.service_account or 'of this step'} may not use TrainJobs in {placement.namespace} ({status}): apply the component "
                "manifests/components/trainer."
            ) from None
        if status == 404 or "Runtime" in str(error):
            raise UserError(
                f"The cluster has no training runtime {placement.runtime} ({cause_of(error)}): install Kubeflow Trainer 2 with its runtimes, correct "
                "trainer.runtime in the cluster's profile, or set training.nodes to 1."
            ) from None
        raise UserError(f"Kubeflow Trainer refuses the TrainJob ({cause_of(error)}).") from None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of the SDK."""
    return next(
        (link.status for link in _chain(error) if isinstance(getattr(link, "status", None), int)), None
    )


def cause_of(error: BaseException) -> str:
    """What lies behind an error of the SDK, in few words."""
    *_, inner = _chain(error)
    reason = getattr(inner, "reason", None) or str(inner)
    body = getattr(inner, "body", None)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        reason = json.loads(body)["message"]
    return " ".join(str(reason).split())[:300].rstrip(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
