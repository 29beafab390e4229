"""`python -m pipelines doctor`: is everything there that a run needs? Each answer with what to do."""

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from kubernetes import client as kubernetes

from components import HOSTS
from components import images as images_of
from pipelines.cli import command_parser
from pipelines.cluster import Cluster, StepSettings, load_cluster
from pipelines.compile import DEFAULT_CLUSTER, images_source
from pipelines.kubeflow.connection import Connection, add_connection_options, connect
from pipelines.kubeflow.findings import BAD, GOOD, UNKNOWN, Finding
from pipelines.kubeflow.logs import core_api
from pipelines.kubeflow.registry import look_at_image
from slam_asr.cli import parse_options
from slam_asr.errors import UserError
from slam_asr.storage import delete, join, write_bytes

SECRET_KEYS = ({"accesskey", "secretkey"}, {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})


def doctor(arguments: list[str]) -> int:
    """Look at everything, and print each answer → 0 where nothing is wrong, else 1."""
    parser = command_parser("doctor", "Look whether a cluster has all that a run needs.")
    parser.add_argument("--cluster", default=DEFAULT_CLUSTER, help="a cluster profile")
    parser.add_argument(
        "--images", type=str, help="a template, or the file that `make images` writes; else the profile's"
    )
    add_connection_options(parser)
    options = parse_options(parser, arguments)
    cluster = load_cluster(options["cluster"])
    namespace = options["namespace"] or cluster.namespace
    wrong = 0
    for finding in examine(
        cluster, namespace, images_source(cluster, options["images"]), lambda: connect(options, cluster)
    ):
        print(finding.line(), flush=True)
        wrong += finding.sign == BAD
    print(
        f"{wrong} to mend" if wrong else f"nothing is wrong that can be seen from here ({UNKNOWN}: not seen)"
    )
    return 1 if wrong else 0


def examine(
    cluster: Cluster, namespace: str, images: str, connected: Callable[[], Connection]
) -> Iterator[Finding]:
    """All answers, one after another."""
    yield from _pipelines(namespace, connected)
    yield from _bucket(cluster)
    yield from _images(images)
    try:
        api = core_api()
    except UserError as error:
        yield Finding(UNKNOWN, "Kubernetes", f"{error} Account, secret, volume and nodes were not looked at.")
        return
    looks: list[tuple[str, Callable[[], Finding]]] = [
        (f"service account {cluster.service_account}", lambda: _account(api, cluster, namespace)),
        *(
            [(f"secret {cluster.storage.secret}", lambda: _secret(api, cluster, namespace))]
            if cluster.storage.secret
            else []
        ),
        *(
            [(f"secret {cluster.models.token_secret}", lambda: _token_secret(api, cluster, namespace))]
            if cluster.models.token_secret
            else []
        ),
        ("launcher's configuration", lambda: _launcher(api, namespace)),
        *(
            [(f"volume of models {cluster.models.claim}", lambda: _claim(api, cluster, namespace))]
            if cluster.models.claim
            else []
        ),
        *(
            [(f"queue {cluster.queue.name}", lambda: _queue(cluster, namespace))]
            if cluster.queue.name
            else []
        ),
        ("nodes", lambda: _nodes(api, cluster)),
        (f"training runtime {cluster.trainer.runtime}", lambda: _runtime(cluster)),
    ]
    for what, look in looks:
        yield _looked(what, namespace, look)


def _pipelines(namespace: str, connected: Callable[[], Connection]) -> Iterator[Finding]:
    try:
        connection = connected()
    except UserError as error:
        yield Finding(BAD, "Kubeflow Pipelines", str(error))
        return
    users = "several users" if connection.multi_user else "one user"
    yield Finding(GOOD, "Kubeflow Pipelines", f"answers at {connection.endpoint}, for {users}")
    try:
        from pipelines.kubeflow.runs import latest

        latest(connection, 1)
        yield Finding(GOOD, f"runs in {namespace}", "you may see them")
    except UserError as error:
        yield Finding(BAD, f"runs in {namespace}", str(error))


def _bucket(cluster: Cluster) -> Iterator[Finding]:
    store = cluster.storage.store
    if not store:
        yield Finding(UNKNOWN, "store", "the profile names none; each run has to")
        return
    before = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_REGION")}
    for name, value in (
        ("AWS_ENDPOINT_URL", cluster.storage.endpoint),
        ("AWS_REGION", cluster.storage.region),
    ):
        if value and not before[name]:
            os.environ[name] = value
    path = join(store, f".doctor-{secrets.token_hex(8)}")
    try:
        write_bytes(path, b"slam-asr looks whether it may write here\n")
        delete(path)
        yield Finding(
            GOOD, f"store {store}", "can be written with your own credentials; the steps use the secret's"
        )
    except UserError as error:
        sign = UNKNOWN if "needs credentials" in str(error) else BAD
        yield Finding(sign, f"store {store}", f"{error} (tried from here, with your own credentials)")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _images(source: str) -> Iterator[Finding]:
    try:
        named = images_of(source)
    except UserError as error:
        yield Finding(BAD, "images", str(error))
        return
    for stage, image in named.items():
        if stage not in HOSTS:
            yield look_at_image(stage, image)


def _looked(what: str, namespace: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except kubernetes.ApiException as error:
        if error.status == 404:
            return Finding(
                BAD,
                what,
                f"is not in {namespace}: make it as docs/cluster-setup.md says, or correct the profile.",
            )
        if error.status in (401, 403):
            return Finding(UNKNOWN, what, f"you may not look at it ({error.status})")
        return Finding(UNKNOWN, what, f"Kubernetes answers {error.status} {error.reason}")
    except urllib3.exceptions.HTTPError as error:
        return Finding(
            UNKNOWN, what, f"Kubernetes does not answer ({type(error).__name__}): check KUBECONFIG"
        )


def _account(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Finding:
    api.read_namespaced_service_account(cluster.service_account, namespace)
    return Finding(GOOD, f"service account {cluster.service_account}", "is there")


def _secret(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Finding:
    what = f"secret {cluster.storage.secret}"
    keys = set(api.read_namespaced_secret(cluster.storage.secret, namespace).data or {})
    if any(wanted <= keys for wanted in SECRET_KEYS):
        return Finding(GOOD, what, "is there, with a key's name and the key")
    return Finding(
        BAD,
        what,
        f"holds {', '.join(sorted(keys)) or 'nothing'}, but must hold accesskey and secretkey, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )


def _token_secret(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Finding:
    what = f"secret {cluster.models.token_secret}"
    if "HF_TOKEN" in (api.read_namespaced_secret(cluster.models.token_secret, namespace).data or {}):
        return Finding(GOOD, what, "is there, with HF_TOKEN")
    return Finding(BAD, what, "has no HF_TOKEN: put the hub's token there under that name.")


def _launcher(api: kubernetes.CoreV1Api, namespace: str) -> Finding:
    root = (api.read_namespaced_config_map("kfp-launcher", namespace).data or {}).get("defaultPipelineRoot")
    if root:
        return Finding(GOOD, "launcher's configuration", f"artifacts go to {root}")
    return Finding(
        UNKNOWN,
        "launcher's configuration",
        "kfp-launcher names no defaultPipelineRoot, so that Kubeflow's own default is used",
    )


def _claim(api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str) -> Finding:
    claim = api.read_namespaced_persistent_volume_claim(cluster.models.claim, namespace)
    what = f"volume of models {cluster.models.claim}"
    if claim.status.phase == "Bound":
        return Finding(
            GOOD,
            what,
            f"is bound, {(claim.status.capacity or {}).get('storage', 'of a size that it does not say')}, {', '.join(claim.spec.access_modes or [])}",
        )
    return Finding(
        UNKNOWN,
        what,
        f"is {claim.status.phase}: right if its storage class waits for the first pod, else `kubectl describe pvc {cluster.models.claim}`",
    )


def _queue(cluster: Cluster, namespace: str) -> Finding:
    what = f"queue {cluster.queue.name}"
    queues = kubernetes.CustomObjectsApi()
    try:
        queues.get_namespaced_custom_object(
            "kueue.x-k8s.io", "v1beta2", namespace, "localqueues", cluster.queue.name
        )
    except kubernetes.ApiException as error:
        if error.status != 404:
            raise
        # An older Kueue, or no such queue.
        queues.get_namespaced_custom_object(
            "kueue.x-k8s.io", "v1beta1", namespace, "localqueues", cluster.queue.name
        )
    return Finding(GOOD, what, "is there")


def _runtime(cluster: Cluster) -> Finding:
    what = f"training runtime {cluster.trainer.runtime}"
    if has_runtime(cluster):
        return Finding(GOOD, what, "is there, for recipes of several nodes")
    return Finding(
        UNKNOWN,
        what,
        "is not there; only recipes of several nodes (training.nodes) need it, and Kubeflow Trainer 2",
    )


def has_runtime(cluster: Cluster) -> bool:
    """Whether Kubeflow Trainer and the profile's runtime are in the cluster.

    Raises:
        kubernetes.ApiException: one may not look.
    """
    try:
        kubernetes.CustomObjectsApi().get_cluster_custom_object(
            "trainer.kubeflow.org", "v1alpha1", "clustertrainingruntimes", cluster.trainer.runtime
        )
    except kubernetes.ApiException as error:
        if error.status != 404:
            raise
        return False
    return True


def require_trainer(cluster: Cluster) -> None:
    """Refuse several nodes where the cluster has no Trainer, as far as that can be seen from here.

    Raises:
        UserError: it has none.
    """
    try:
        core_api()
        there = has_runtime(cluster)
    except (UserError, kubernetes.ApiException, urllib3.exceptions.HTTPError):
        return
    if not there:
        raise UserError(
            f"The recipe asks for several nodes, but the cluster has no training runtime {cluster.trainer.runtime}: install Kubeflow Trainer 2 with its "
            "runtimes, correct trainer.runtime in the profile, or set training.nodes to 1."
        )


def _nodes(api: kubernetes.CoreV1Api, cluster: Cluster) -> Finding:
    nodes = [node for node in api.list_node().items if not node.spec.unschedulable]
    wanting = {
        name: step
        for name, step in ((n, cluster.steps[n]) for n in ("extract-features", "train", "decode"))
        if step.gpus
    }
    if not wanting:
        return Finding(GOOD, "nodes", f"{len(nodes)} that take pods; the profile asks for no GPU")
    lacking = {name: step for name, step in wanting.items() if not any(_fits(node, step) for node in nodes)}
    if not lacking:
        return Finding(GOOD, "nodes", f"{len(nodes)} that take pods, and for each step one with enough GPUs")
    name, step = next(iter(lacking.items()))
    most = max((_gpus(node, step) for node in nodes), default=0)
    return Finding(
        BAD,
        "nodes",
        (
            f"none has {step.gpus} × {step.gpu_resource} for {name} (the most is {most}) with the labels of node_selector and no taint that is not tolerated: "
            f"lower steps.{name.replace('-', '_')}.gpus, or correct node_selector and tolerations. A cluster that adds nodes by itself may still do it."
        ),
    )


def _gpus(node: Any, step: StepSettings) -> int:
    return int((node.status.allocatable or {}).get(step.gpu_resource, 0))


def _fits(node: Any, step: StepSettings) -> bool:
    labels = node.metadata.labels or {}
    taints = [taint for taint in node.spec.taints or [] if taint.effect in ("NoSchedule", "NoExecute")]
    return (
        _gpus(node, step) >= step.gpus
        and all(labels.get(key) == value for key, value in step.node_selector.items())
        and all(any(_tolerates(t, taint) for t in step.tolerations) for taint in taints)
    )


def _tolerates(toleration: dict[str, str], taint: Any) -> bool:
    if toleration.get("effect", taint.effect) != taint.effect:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", taint.key) == taint.key
    return toleration.get("key") == taint.key and toleration.get("value", "") == (taint.value or "")
