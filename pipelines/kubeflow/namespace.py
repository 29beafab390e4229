"""Checks of what a run needs in its namespace: account and rights, secrets, model volume and queue."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kubernetes import client as kubernetes

from pipelines.cluster import Cluster, Storage
from pipelines.kubeflow.kubernetes_api import if_exists
from slam_asr.findings import BAD, GOOD, UNKNOWN

DEFAULT_SECRET = "mlpipeline-minio-artifact"
"""Secret of the object storage that Kubeflow Pipelines brings along."""
STORAGE_KEYS = (("accesskey", "secretkey"), ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
"""Pairs of keys; the storage secret must contain both keys of one pair."""
_RUNNER = "slam-asr-runner"
"""The account and the role in `manifests/runner`."""
_RUNNER_SECRETS = (Storage().secret, DEFAULT_SECRET)
"""The secrets that this role may read."""
_CLUSTER_WIDE = "clustertrainingruntimes"
"""The only resource among the rights that is in no namespace."""

Result = tuple[str, str]
"""The sign and the detail of the finding of a check."""
Right = tuple[str, str, str, str]
"""(verb, API group, resource, name); an empty name stands for all."""


@dataclass(frozen=True)
class Check:
    """A check that asks the Kubernetes API."""

    subject: str
    run: Callable[[], Result]
    """Returns the result, or raises an error, from which `doctor` makes a finding."""
    remedy: str = ""
    """What to do if the object does not exist, without a full stop."""


def namespace_checks(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Iterator[Check]:
    """Yield the checks of the account, the secrets, the model volume and the queue of a profile."""
    from pipelines.placement import REGISTRY_KEYS  # imports kfp, which is slow

    account, models = cluster.service_account, cluster.models
    yield Check(
        f"service account {account}",
        lambda: _check_account(api, account, namespace),
        f"`kubectl apply -n {namespace} -k manifests/runner` creates it"
        if account == _RUNNER
        else f"`kubectl -n {namespace} create serviceaccount {account}` creates it",
    )
    if secret := cluster.storage.secret:
        create = create_secret(cluster, secret, namespace, *STORAGE_KEYS[0])
        yield Check(f"secret {secret}", lambda: _check_keys(api, namespace, secret, STORAGE_KEYS), create)
    for name, alternatives in (
        (models.token_secret, [("HF_TOKEN",)]),
        # Kubeflow's registry needs one key, MLflow's one or two.
        (cluster.registry.secret, [REGISTRY_KEYS[:1], REGISTRY_KEYS[1:2], REGISTRY_KEYS[2:]]),
        (cluster.on_exit.format and cluster.on_exit.secret, [(cluster.on_exit.key,)]),
    ):
        if name:
            check = functools.partial(_check_keys, api, namespace, name, alternatives)
            yield Check(f"secret {name}", check, create_secret(cluster, name, namespace, *alternatives[0]))
    for name in cluster.images.pull_secrets:
        create = (
            f"`kubectl -n {namespace} create secret docker-registry {name} --docker-server=… "
            "--docker-username=… --docker-password=…` creates it"
        )
        check = functools.partial(_check_pull_secret, api, namespace, name, create)
        yield Check(f"pull secret {name}", check, create)
    if models.claim:
        yield Check(
            f"model volume {models.claim}",
            lambda: _check_claim(api, models.claim, namespace),
            f"`kubectl apply -n {namespace} -k manifests/runner` creates slam-asr-models; write that name, "
            "or the name of another volume claim, into models.claim",
        )
    if cluster.queue.name:
        yield Check(
            f"queue {cluster.queue.name}",
            lambda: _check_queue(cluster.queue.name, namespace),
            "add manifests/components/kueue to your overlay and apply it, or correct queue.name",
        )


def create_secret(cluster: Cluster, name: str, namespace: str, *keys: str) -> str:
    """Return a sentence with the command that creates a secret with these keys, without a full stop."""
    if name == DEFAULT_SECRET and namespace != cluster.kubeflow_namespace:
        # Kubeflow's profile controller copies its own secret to the namespaces with this label.
        label = "pipelines.kubeflow.org/enabled=true"
        return f"`kubectl label namespace {namespace} {label}` makes Kubeflow create it"
    values = " ".join(f"--from-literal={key}=…" for key in keys)
    return f"`kubectl -n {namespace} create secret generic {name} {values}` creates it"


def check_rights(cluster: Cluster, namespace: str, launcher_secret: str) -> Result:
    """Check the rights of the runs' account, by asking the cluster what this account may do.

    Args:
        cluster: the profile.
        namespace: namespace of the runs.
        launcher_secret: the secret that Kubeflow's launcher reads; empty if it reads none.

    Raises:
        kubernetes.ApiException: you are not allowed to ask, or the API does not answer.
    """
    account = cluster.service_account
    missing = _missing_rights(account, namespace, run_rights(launcher_secret))
    if not missing:
        return GOOD, "it may do what driver, launcher and Argo do in its name"
    remedy = f"`kubectl apply -n {namespace} -k manifests/runner` grants what runs need"
    if account != _RUNNER:
        remedy += (
            f" to {_RUNNER}, and `kubectl -n {namespace} create rolebinding {account} --role={_RUNNER} "
            f"--serviceaccount={namespace}:{account}` to {account}"
        )
    if launcher_secret not in ("", *_RUNNER_SECRETS):
        remedy += (
            f", once {launcher_secret} is among the resourceNames in manifests/runner/service-account.yaml"
        )
    return BAD, f"it is not allowed to {', '.join(missing)} in {namespace}: {remedy}."


def check_training_rights(cluster: Cluster, namespace: str, nodes: int) -> Result:
    """Check the rights of the step that starts and watches a TrainJob.

    Args:
        cluster: the profile.
        namespace: namespace of the runs.
        nodes: number of nodes to train on; with 1, missing rights are no problem.

    Raises:
        kubernetes.ApiException: you are not allowed to ask, or the API does not answer.
    """
    missing = _missing_rights(cluster.service_account, namespace, training_rights(cluster.trainer.runtime))
    if not missing:
        return GOOD, "it may start and watch them"
    only = "" if nodes > 1 else ", which only multi-node training needs"
    return BAD if nodes > 1 else UNKNOWN, (
        f"it is not allowed to {', '.join(missing)} in {namespace}{only}: add "
        "manifests/components/trainer to your overlay, and apply it with `kubectl apply -k`."
    )


def run_rights(launcher_secret: str) -> Iterator[Right]:
    """Yield the rights that Argo, Kubeflow's driver and its launcher need in the pods of a run."""
    # Argo's executor reports the result of each pod in an object of this kind.
    yield "create", "argoproj.io", "workflowtaskresults", ""
    yield "patch", "argoproj.io", "workflowtaskresults", ""
    yield "get", "", "configmaps", "kfp-launcher"
    yield "get", "", "pods", ""
    # Secrets that a pod mounts are read by its node, not by the account.
    if launcher_secret:
        yield "get", "", "secrets", launcher_secret


def training_rights(runtime: str) -> Iterator[Right]:
    """Yield the further rights that the step `train` needs for multi-node training."""
    group = "trainer.kubeflow.org"
    # Trainer's SDK first looks for a runtime in the namespace.
    yield "get", group, "trainingruntimes", runtime
    yield "get", group, _CLUSTER_WIDE, runtime
    for verb in ("get", "create", "delete", "patch"):
        yield verb, group, "trainjobs", ""
    yield "get", "", "pods", ""
    yield "list", "", "pods", ""
    yield "list", "", "events", ""
    yield "get", "", "pods/log", ""


def _missing_rights(account: str, namespace: str, rights: Iterable[Right]) -> list[str]:
    """Return the rights that an account lacks, as a verb, a resource and perhaps a name."""
    return [
        f"{verb} {resource}{f' {name}' if name else ''}"
        for verb, group, resource, name in rights
        if not _may(account, namespace, verb, group, resource, name)
    ]


def _may(account: str, namespace: str, verb: str, group: str, resource: str, name: str) -> bool:
    resource, _, subresource = resource.partition("/")
    attributes = kubernetes.V1ResourceAttributes(
        namespace=None if resource == _CLUSTER_WIDE else namespace,
        verb=verb,
        group=group,
        resource=resource,
        subresource=subresource or None,
        name=name or None,
    )
    # A review does not look up an account's groups. Rights may be bound to the groups that contain all
    # service accounts, so the review names these groups.
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    review = kubernetes.V1SubjectAccessReview(
        spec=kubernetes.V1SubjectAccessReviewSpec(
            user=f"system:serviceaccount:{namespace}:{account}", groups=groups, resource_attributes=attributes
        )
    )
    answer = kubernetes.AuthorizationV1Api().create_subject_access_review(review)
    return bool(answer.status.allowed)


def _check_account(api: kubernetes.CoreV1Api, account: str, namespace: str) -> Result:
    api.read_namespaced_service_account(account, namespace)
    return GOOD, "exists"


def _check_keys(
    api: kubernetes.CoreV1Api, namespace: str, secret: str, alternatives: Iterable[tuple[str, ...]]
) -> Result:
    """Check that a secret contains all keys of one of the alternatives."""
    # Only the names of the keys: the values never leave this line.
    found = set(api.read_namespaced_secret(secret, namespace).data or {})
    for keys in alternatives:
        if found.issuperset(keys):
            return GOOD, f"exists, with {' and '.join(keys)}"
    needed = [" and ".join(keys) for keys in alternatives]
    return BAD, (
        f"contains {', '.join(sorted(found)) or 'nothing'}, but must contain {', or '.join(needed)}: add "
        f"what is missing with `kubectl -n {namespace} edit secret {secret}`."
    )


def _check_pull_secret(api: kubernetes.CoreV1Api, namespace: str, secret: str, create: str) -> Result:
    kind = api.read_namespaced_secret(secret, namespace).type
    if kind in ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"):
        return GOOD, "exists, with a login to a registry"
    return BAD, f"is of type {kind}, but nodes need kubernetes.io/dockerconfigjson: delete it, then {create}."


def _check_claim(api: kubernetes.CoreV1Api, name: str, namespace: str) -> Result:
    claim = api.read_namespaced_persistent_volume_claim(name, namespace)
    if claim.status.phase == "Bound":
        size = (claim.status.capacity or {}).get("storage", "unknown size")
        return GOOD, f"is bound, {size}, {', '.join(claim.spec.access_modes or [])}"
    return UNKNOWN, (
        f"is {claim.status.phase}: expected if its storage class waits for the first pod, "
        f"else see `kubectl -n {namespace} describe pvc {name}`"
    )


def _check_queue(name: str, namespace: str) -> Result:
    read = kubernetes.CustomObjectsApi().get_namespaced_custom_object
    if if_exists(read, "kueue.x-k8s.io", "v1beta2", namespace, "localqueues", name) is None:
        # Kueue before 0.15 has only v1beta1. If that request is answered with 404 too, the queue does not
        # exist, and doctor reports it.
        read("kueue.x-k8s.io", "v1beta1", namespace, "localqueues", name)
    return GOOD, "exists"
