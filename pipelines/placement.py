"""Applies the settings of a cluster profile to the tasks of a pipeline.

kfp itself sets image, CPU, memory, GPUs, environment and retries; kfp-kubernetes sets everything else.
kfp-kubernetes supports only three settings of a pod's security context: user, group and non-root.
Capabilities, seccomp and privilege escalation are left to Kubeflow's backend and the namespace's pod security
labels.
"""

import json
from dataclasses import asdict, replace

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components import CACHE
from pipelines.cluster import Cluster, StepSettings
from pipelines.quantities import seconds
from slam_asr import __version__
from slam_asr.artifacts.costs import PRICES
from slam_asr.artifacts.run_records import RUN
from slam_asr.notices.notice import URL_FILE
from slam_asr.steps import STEPS
from slam_asr.storage.client import SECRET_FOLDER
from slam_asr.trainjob.placement import NO_LIMIT, Placement

_KUEUE = "kueue.x-k8s.io"
_TEN_YEARS = 10 * 365 * 24 * 3600
"""Seconds that bound the retries of a step whose attempts have no time limit."""

REGISTRY_KEYS = (
    "MODEL_REGISTRY_TOKEN",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""Keys of the secret `registry.secret`. `open-registry` and `publish` get them as environment variables."""

COORDINATOR = StepSettings(cpu="100m", cpu_limit="1", memory="512Mi", scratch="10Gi")
"""Settings of the step `train` in multi-node training: it only starts a TrainJob and watches it."""
NOTIFIER = StepSettings(
    cpu="100m", cpu_limit="1", memory="512Mi", scratch="", retries=1, retry_after="10s", timeout_hours=0.25
)
"""Settings of the task `notify`, which sends one message."""
_WEBHOOK_FOLDER = "/var/run/secrets/slam-asr/webhook"
_EXTRA_HOURS = 1.0
"""Hours that the watching step may run longer than its TrainJob, so that it can report why the job ended."""


def place(
    cluster: Cluster, images: dict[str, str], step: str, task: PipelineTask, by_trainjob: bool = False
) -> None:
    """Apply the profile's settings for a step to its task.

    Args:
        cluster: the profile.
        images: image of each step.
        step: name of the step.
        task: the step's task; changed in place.
        by_trainjob: whether a TrainJob does the step's work, so that the step's own pod needs no GPU.
    """
    settings = cluster.steps[step]
    # Each of kfp's setters makes this check, and finds the setter's name for its message by inspect.stack(),
    # which reads the source of all callers. All steps have a container, so the check cannot fail.
    task._ensure_container_spec_exists = lambda: None
    task.set_container_image(images[step])
    task.set_display_name(step)
    pod = _coordinator(cluster) if by_trainjob else NOTIFIER if step == "notify" else settings
    _resources(task, pod)
    _storage(task, cluster, pod)
    if step == "notify":
        _webhook(task, cluster)
    else:
        _models(task, cluster, publishes="publish" in (step, STEPS[step].image))
    # Kubeflow labels every pod with the id of its run.
    kubernetes.use_field_path_as_env(task, RUN, "metadata.labels['pipeline/runid']")
    for name, value in environment(cluster).items():
        task.set_env_variable(name, value)
    task.set_retry(
        pod.retries,
        backoff_duration=f"{seconds(pod.retry_after)}s",
        backoff_factor=2.0,
        backoff_max_duration=f"{_retry_seconds(pod)}s",
    )
    if pod.timeout_hours:
        kubernetes.set_timeout(task, round(pod.timeout_hours * 3600))
    if not by_trainjob:
        for label, value in settings.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        for taint in settings.tolerations:
            kubernetes.add_toleration(task, **{"operator": "Equal", **taint})
    # A step that only watches its TrainJob must not compete with that job for the quota of the queue, and a
    # notice must not wait in the queue.
    for label, value in labels(cluster, step, queued=not by_trainjob and step != "notify").items():
        kubernetes.add_pod_label(task, label, value)
    for name, value in settings.annotations.items():
        kubernetes.add_pod_annotation(task, name, value)
    kubernetes.set_image_pull_policy(task, cluster.images.pull_policy)
    if cluster.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.images.pull_secrets)
    kubernetes.set_security_context(
        task, run_as_user=cluster.run_as_user, run_as_group=cluster.run_as_user, run_as_non_root=True
    )


def placement(cluster: Cluster, image: str) -> str:
    """Return the `Placement` for the nodes of a multi-node training, as JSON.

    It is the input `trainjob` of the step `train`.

    Args:
        cluster: the profile.
        image: image of the step `train`.
    """
    step = cluster.steps["train"]
    gpus = {step.gpu_resource: str(step.gpus)} if step.gpus else {}
    return json.dumps(
        asdict(
            Placement(
                namespace=cluster.namespace,
                image=image,
                runtime=cluster.trainer.runtime,
                resources={"cpu": step.cpu, "memory": step.memory, **gpus},
                cpu_limit=step.cpu_limit,
                shared_memory=step.shared_memory,
                scratch=step.scratch,
                cache=CACHE,
                models_claim=cluster.models.claim,
                storage_secret=cluster.storage.secret,
                token_secret=cluster.models.token_secret,
                environment=environment(cluster),
                service_account=cluster.service_account,
                run_as_user=cluster.run_as_user,
                pull_secrets=cluster.images.pull_secrets,
                node_selector=step.node_selector,
                tolerations=step.tolerations,
                labels=labels(cluster, "train", queued=True),
                annotations=step.annotations,
                timeout_hours=cluster.trainer.timeout_hours,
            )
        ),
        # The same profile must give the same bytes: `versions.upload` recognises a version by its digest.
        sort_keys=True,
    )


def _coordinator(cluster: Cluster) -> StepSettings:
    """Return the settings of the step that only watches a TrainJob.

    It is retried like `train`, and may run a little longer than the job. If `train` has no CPU limit, it has
    none either.
    """
    step, hours = cluster.steps["train"], cluster.trainer.timeout_hours
    return replace(
        COORDINATOR,
        cpu_limit=NO_LIMIT if step.cpu_limit == NO_LIMIT else COORDINATOR.cpu_limit,
        retries=step.retries,
        retry_after=step.retry_after,
        timeout_hours=hours + _EXTRA_HOURS if hours else 0.0,
    )


def environment(cluster: Cluster) -> dict[str, str]:
    """Return the environment variables of all steps; none is secret."""
    return {
        "SLAM_ASR_CACHE": CACHE,
        **({"AWS_ENDPOINT_URL": cluster.storage.endpoint} if cluster.storage.endpoint else {}),
        **({"AWS_REGION": cluster.storage.region} if cluster.storage.region else {}),
        **({"HF_HUB_OFFLINE": "1"} if cluster.models.offline else {}),
        **({PRICES: json.dumps(asdict(cluster.prices))} if cluster.prices else {}),
        **cluster.environment,
    }


def labels(cluster: Cluster, step: str, queued: bool) -> dict[str, str]:
    """Return the labels of a step's pods, including those for Kueue only if `queued`."""
    return {
        "app.kubernetes.io/part-of": "slam-asr",
        "app.kubernetes.io/component": step,
        "app.kubernetes.io/version": __version__,
        **({f"{_KUEUE}/queue-name": cluster.queue.name} if cluster.queue.name and queued else {}),
        **({f"{_KUEUE}/priority-class": cluster.queue.priority} if cluster.queue.priority and queued else {}),
        **cluster.steps[step].labels,
    }


def _resources(task: PipelineTask, step: StepSettings) -> None:
    task.set_cpu_request(step.cpu)
    if step.cpu_limit != NO_LIMIT:
        task.set_cpu_limit(step.cpu_limit or step.cpu)
    # Request and limit are equal: memory cannot be throttled, and a node that runs out of it kills pods that
    # use more than their request.
    task.set_memory_request(step.memory).set_memory_limit(step.memory)
    if step.gpus:
        task.set_accelerator_type(step.gpu_resource).set_accelerator_limit(step.gpus)
    if step.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=step.shared_memory)


def _storage(task: PipelineTask, cluster: Cluster, step: StepSettings) -> None:
    if step.scratch:
        kubernetes.empty_dir_mount(task, "scratch", CACHE, size_limit=step.scratch)
    if cluster.storage.secret:
        # The secret is mounted as files, so that a running step sees a rotated secret, and so that it never
        # appears in the environment.
        kubernetes.use_secret_as_volume(task, cluster.storage.secret, SECRET_FOLDER)


def _models(task: PipelineTask, cluster: Cluster, publishes: bool) -> None:
    if cluster.models.claim:
        kubernetes.mount_pvc(task, cluster.models.claim, f"{CACHE}/models")
    if cluster.models.token_secret:
        kubernetes.use_secret_as_env(task, cluster.models.token_secret, {"HF_TOKEN": "HF_TOKEN"})
    if cluster.registry.secret and publishes:
        # The keys are optional, because the secret has those of one registry only.
        keys = {key: key for key in REGISTRY_KEYS}
        kubernetes.use_secret_as_env(task, cluster.registry.secret, keys, optional=True)


def _webhook(task: PipelineTask, cluster: Cluster) -> None:
    # The secret is optional: a pod, and with it the run, would wait for ever for a missing one.
    kubernetes.use_secret_as_volume(task, cluster.on_exit.secret, _WEBHOOK_FOLDER, optional=True)
    task.set_env_variable(URL_FILE, f"{_WEBHOOK_FOLDER}/{cluster.on_exit.key}")


def _retry_seconds(step: StepSettings) -> int:
    """Return the seconds from a step's first start after which Argo no longer retries it.

    kfp calls this bound `backoff_max_duration`, but it is not the longest wait: Argo compares it with the
    time since the first attempt began. So it must allow for every attempt and every wait.
    """
    if not step.timeout_hours:
        return _TEN_YEARS
    # The waits double: first, 2 × first, 4 × first …, one before each retry.
    # https://github.com/kubeflow/pipelines/issues/14245 is about this meaning of the bound.
    waits = seconds(step.retry_after) * (2**step.retries - 1)
    return round((step.retries + 1) * step.timeout_hours * 3600) + waits
