"""Request a TrainJob through Kubeflow Trainer's SDK, and explain a refusal in one sentence."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kubernetes.client import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from slam_asr.errors import ClusterError
from slam_asr.progress import log_line
from slam_asr.storage.client import SECRET_FOLDER
from slam_asr.trainjob.owner import add_owner, owner_of_this_step
from slam_asr.trainjob.placement import NO_LIMIT, Placement

if TYPE_CHECKING:
    from kubeflow.trainer.options import RuntimePatch

NODE = "node"
"""Name of the replicated job that trains, and of its container, in Trainer's runtimes."""
TOKEN_FOLDER = "/var/run/secrets/slam-asr/hub"
"""Folder at which the secret with the hub's token is mounted in each node's pod."""
_ADMISSION = re.compile(r"denied (the )?request|exceeded quota|violates PodSecurity")
"""Matches the message of a 403 with which a webhook, a policy or a quota refuses the object itself. Any other
403 means that the account lacks a right."""


class TrainJobClient:
    """A client for TrainJobs in one namespace, which uses Kubeflow Trainer's SDK.

    Args:
        placement: settings for each node's pod, including the namespace.
    """

    def __init__(self, placement: Placement) -> None:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient

        self.placement = placement
        self.client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=placement.namespace))
        # Fails here, before anything is created, if the runtime does not exist.
        self.runtime = self.client.get_runtime(placement.runtime)
        self.core_api = self.client.backend.core_api
        self.custom_api = self.client.backend.custom_api
        self.owner = owner_of_this_step(self.core_api, placement.namespace)
        # The SDK has no option for a job's owner, and sets every resource's limit to its request.
        # `_send_with_owner_and_limit` therefore changes both in the request that the SDK sends.
        self._send = self.custom_api.create_namespaced_custom_object
        self.custom_api.create_namespaced_custom_object = self._send_with_owner_and_limit

    def create(self, name: str, nodes: int, command: list[str]) -> None:
        """Create a TrainJob.

        Args:
            name: name of the job.
            nodes: number of pods.
            command: program and arguments that each node runs.
        """
        from kubeflow.trainer import CustomTrainerContainer
        from kubeflow.trainer import options as sdk

        placement = self.placement
        # For the hub's token, the path of a mounted file is given. The token's variable cannot come from a
        # secret: the SDK accepts only plain values, and Trainer's webhook refuses variables in changes to the
        # runtime.
        token = {"HF_TOKEN_PATH": f"{TOKEN_FOLDER}/HF_TOKEN"} if placement.token_secret else {}
        trainer = CustomTrainerContainer(
            image=placement.image,
            num_nodes=nodes,
            resources_per_node=placement.resources,
            env=token | placement.environment,
        )
        options: list[Any] = [
            sdk.Name(name),
            sdk.TrainerCommand(command[:1]),
            sdk.TrainerArgs(command[1:]),
            runtime_patch(placement),
        ]
        if placement.labels:
            options.append(sdk.Labels(dict(placement.labels)))
        if placement.timeout_hours:
            options.append(sdk.ActiveDeadlineSeconds(round(placement.timeout_hours * 3600)))
        if placement.annotations:
            options.append(sdk.Annotations(dict(placement.annotations)))
        self.client.train(runtime=self.runtime, trainer=trainer, options=options)

    def adopt(self, name: str) -> None:
        """Make this run an owner of an existing job.

        Otherwise, the job would be deleted together with the run that created it.
        """
        if self.owner is None:
            return
        try:
            add_owner(self.custom_api, self.placement.namespace, name, self.owner)
        except (ApiException, HTTPError) as error:
            log_line(
                f"TrainJob {name} ends with the workflow of the run that created it, because this run "
                f"cannot become its owner ({cause_of(error)})"
            )

    def _send_with_owner_and_limit(
        self, group: str, version: str, namespace: str, plural: str, job: dict[str, Any], **options: Any
    ) -> Any:
        """Add the owner and the limit on cores to the SDK's request for a job, and send the request."""
        if self.owner is not None:
            job["metadata"]["ownerReferences"] = [self.owner]
        limits = job["spec"]["trainer"].get("resourcesPerNode", {}).get("limits", {})
        if self.placement.cpu_limit == NO_LIMIT:
            limits.pop("cpu", None)
        elif self.placement.cpu_limit:
            limits["cpu"] = self.placement.cpu_limit
        return self._send(group, version, namespace, plural, job, **options)


def runtime_patch(placement: Placement) -> "RuntimePatch":
    """Build the changes to the runtime's pods: labels, volumes, secrets, node selection, user and account."""
    from kubeflow.trainer import options as sdk

    volumes = _volumes(placement)
    container = sdk.ContainerPatch(
        name=NODE,
        volume_mounts=[{"name": volume["name"], "mountPath": path} for volume, path in volumes] or None,
        # With the pod's security context below, this satisfies Kubernetes' pod security level `restricted`.
        security_context={"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    )
    user = placement.run_as_user
    pod = sdk.PodSpecPatch(
        service_account_name=placement.service_account or None,
        volumes=[volume for volume, _ in volumes] or None,
        containers=[container],
        image_pull_secrets=[{"name": secret} for secret in placement.pull_secrets] or None,
        security_context={
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            # Kubernetes makes mounted volumes writable for this group.
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        node_selector=placement.node_selector or None,
        tolerations=placement.tolerations or None,
    )
    template = sdk.PodTemplatePatch(
        metadata={"labels": placement.labels} if placement.labels else None, spec=pod
    )
    replicated = sdk.ReplicatedJobPatch(
        name=NODE, template=sdk.JobTemplatePatch(spec=sdk.JobSpecPatch(template=template))
    )
    return sdk.RuntimePatch(
        sdk.TrainingRuntimeSpecPatch(sdk.JobSetTemplatePatch(spec=sdk.JobSetSpecPatch([replicated])))
    )


def _volumes(placement: Placement) -> list[tuple[dict[str, Any], str]]:
    """Return the volumes that the settings ask for, each with its mount path."""
    memory, scratch = placement.shared_memory, placement.scratch
    claim, secret, token = placement.models_claim, placement.storage_secret, placement.token_secret
    volumes: list[tuple[str, str, dict[str, Any], str]] = [
        (memory, "shm", {"emptyDir": {"medium": "Memory", "sizeLimit": memory}}, "/dev/shm"),
        (scratch, "scratch", {"emptyDir": {"sizeLimit": scratch}}, placement.cache),
        (claim, "models", {"persistentVolumeClaim": {"claimName": claim}}, f"{placement.cache}/models"),
        (secret, "s3", {"secret": {"secretName": secret}}, SECRET_FOLDER),
        (token, "hub", {"secret": {"secretName": token}}, TOKEN_FOLDER),
    ]
    return [({"name": name, **source}, path) for setting, name, source, path in volumes if setting]


@contextlib.contextmanager
def explained_refusals(placement: Placement) -> Iterator[None]:
    """Turn exceptions of the SDK into a `ClusterError` whose message says what to do.

    Args:
        placement: names the account, the namespace and the runtime for the message.

    Raises:
        ClusterError: the SDK raised an exception.
    """
    try:
        yield
    except (ConfigException, TimeoutError, RuntimeError, ValueError) as error:
        raise ClusterError(_explain(error, placement)) from None


def _explain(error: Exception, placement: Placement) -> str:
    if isinstance(error, ConfigException):
        reason = " ".join(str(error).split()).rstrip(".")
        return f"No Kubernetes API is configured here ({reason}): training on several nodes needs a cluster."
    if isinstance(error, TimeoutError):
        return f"The Kubernetes API does not answer ({error}): try again."
    status, cause = status_of(error), cause_of(error)
    # The SDK wraps the exceptions of its Kubernetes client, so the complete chain is searched.
    if any(isinstance(link, HTTPError) for link in _chain(error)):
        return f"The Kubernetes API does not answer ({cause}): try again."
    if _ADMISSION.search(cause):
        return (
            f"The cluster does not accept the TrainJob ({cause}): correct what it names in the cluster's "
            "profile, or in the cluster."
        )
    if status == 401:
        return (
            f"Kubernetes refuses the token of this step's account ({cause}): start the step again, "
            "which then gets a new one."
        )
    if status == 403:
        return (
            f"The account {placement.service_account or 'of this step'} is not allowed to use TrainJobs "
            f"in {placement.namespace} (403): apply the component manifests/components/trainer."
        )
    if status == 404 or "Runtime" in str(error):
        return (
            f"The cluster has no training runtime {placement.runtime} ({cause}): install Kubeflow Trainer 2 "
            "with its runtimes, correct trainer.runtime in the cluster's profile, or set training.nodes to 1."
        )
    return f"Kubeflow Trainer refuses the TrainJob ({cause})."


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that caused an error of the SDK, or None."""
    # The SDK raises plain exceptions. Only the exception of its Kubernetes client, which caused them, has a
    # status.
    statuses = (getattr(link, "status", None) for link in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def cause_of(error: BaseException) -> str:
    """Return the message of the first exception that led to an error of the SDK, as one line.

    A message of more than 400 characters loses its middle, because a webhook repeats the complete object
    before it says what is wrong with it.
    """
    *_, inner = _chain(error)
    reason = getattr(inner, "reason", None) or str(inner)
    # Kubernetes explains a refusal in the JSON body of its answer.
    body: Any = getattr(inner, "body", None)
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        reason = json.loads(body)["message"]
    text = " ".join(str(reason).split()).rstrip(".")
    return text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the error that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
