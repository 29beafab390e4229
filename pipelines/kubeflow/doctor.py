"""`python -m pipelines doctor`: check that a cluster has everything that a run needs.

The finding of a failed check usually says what to do about it.
"""

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client as kubernetes

from components import images as images_of
from pipelines.cli import command_parser
from pipelines.cluster import Cluster, load_cluster
from pipelines.compile import DEFAULT_CLUSTER, OLDEST_BACKEND, images_source
from pipelines.kubeflow import backend
from pipelines.kubeflow.commands import flags, require_seconds
from pipelines.kubeflow.connection import Connection, ConnectionOptions, NotFound, connect
from pipelines.kubeflow.kubernetes_api import core_api
from pipelines.kubeflow.namespace import Check, Result, check_rights, check_training_rights, namespace_checks
from pipelines.kubeflow.nodes import check_nodes, loaded_images
from pipelines.kubeflow.registry import check_images
from pipelines.kubeflow.trainer import check_runtime, check_version
from pipelines.processes import variables
from slam_asr.errors import ConfigurationError, UserError
from slam_asr.findings import BAD, GOOD, UNKNOWN, Finding
from slam_asr.options import add_options, parse_options
from slam_asr.steps import OWN_IMAGE
from slam_asr.storage import delete, join, write_bytes
from slam_asr.storage.failures import CredentialsMissing


@dataclass
class Options:
    """Options of `doctor`, besides those of the connection."""

    cluster: str = DEFAULT_CLUSTER
    """name or file of a cluster profile"""
    images: str | None = None
    """template for image names, or the file that `make images` writes (default: SLAM_ASR_IMAGES, else the
    profile's images.names)"""
    run: bool = False
    """also start a small pod for each kind of step, which checks what the step needs from inside"""
    nodes: int = 1
    """with --run: also start a TrainJob with this many pods, which must reach each other; 1 starts no
    TrainJob"""
    patience: float = 600.0
    """with --run: seconds for which a pod may wait to start, such as for a large image"""
    poll: float = 5.0
    """with --run: seconds between two requests for the run's state"""


def doctor(arguments: list[str]) -> int:
    """Run all checks, print each finding, and return 1 if any check failed, else 0."""
    parser = command_parser("doctor", "Check that a cluster has everything that a run needs.")
    add_options(parser, Options)
    add_options(parser, ConnectionOptions)
    options = parse_options(parser, flags(arguments))
    require_seconds(options, "patience", "poll")
    _require_valid_nodes(options)
    cluster = load_cluster(options["cluster"])
    failed = 0
    for finding in _all_findings(cluster, options):
        print(finding.line(), flush=True)
        failed += finding.sign == BAD
    problems = f"{failed} problem{'s' * (failed > 1)} found"
    print(problems if failed else f"no problems found ({UNKNOWN}: could not be checked from here)")
    return 1 if failed else 0


def _require_valid_nodes(options: dict[str, Any]) -> None:
    """Check the option `--nodes`.

    Raises:
        ConfigurationError: it is below 1, or needs `--run`, which is missing.
    """
    nodes = options["nodes"]
    if nodes < 1:
        raise ConfigurationError(f"--nodes is {nodes}: a TrainJob needs at least 1 pod.")
    if nodes > 1 and not options["run"]:
        raise ConfigurationError(f"--nodes is {nodes}, but a TrainJob is only started with --run: add it.")


def _all_findings(cluster: Cluster, options: dict[str, Any]) -> Iterator[Finding]:
    """Yield the findings from here, and then those of a run, if one is requested."""
    images = images_source(cluster, options["images"])
    namespace = options["namespace"] or cluster.namespace
    connection: Connection | None = None
    try:
        connection = connect(options, cluster)
    except UserError as error:
        yield Finding(BAD, "Kubeflow Pipelines", str(error))
    if connection:
        yield from _check_pipelines(connection, namespace)
        namespace = connection.namespace
    yield from examine(cluster, namespace, images, connection, options["nodes"])
    if not options["run"]:
        return
    if connection is None:
        yield Finding(UNKNOWN, "run", "was not started, because Kubeflow Pipelines does not answer")
        return
    # This imports kfp, which is slow.
    from pipelines.kubeflow.check_run import CheckRun

    try:
        run = CheckRun(cluster, images_of(images), options["nodes"], options["patience"], options["poll"])
        yield from run.findings(connection, lambda line: print(line, flush=True))
    except NotFound:
        yield Finding(BAD, "run", "somebody deleted it before it ended: start doctor again")
    except UserError as error:
        yield Finding(BAD, "run", str(error))


def examine(
    cluster: Cluster, namespace: str, images: str, connection: Connection | None, nodes: int = 1
) -> Iterator[Finding]:
    """Run all checks that are made from here, and yield each finding as soon as it is known.

    Args:
        cluster: the profile.
        namespace: namespace of the runs.
        images: template or file of image names.
        connection: the connection to Kubeflow Pipelines, if it answers.
        nodes: number of nodes to train on, if that is known.
    """
    yield from _check_store(cluster)
    try:
        api = core_api()
    except UserError as error:
        yield from _check_images(cluster, images, None)
        yield Finding(UNKNOWN, "Kubernetes", f"{error} Account, secrets, volume and nodes were not checked.")
        return
    yield from _check_images(cluster, images, loaded_images(api))
    for check in _cluster_checks(api, cluster, namespace, connection, nodes):
        yield _finding_of(check, namespace)


def _cluster_checks(
    api: kubernetes.CoreV1Api, cluster: Cluster, namespace: str, connection: Connection | None, nodes: int
) -> Iterator[Check]:
    """Yield each check that asks the Kubernetes API."""
    account, trainer = cluster.service_account, cluster.trainer
    yield from namespace_checks(api, cluster, namespace)
    yield Check("launcher configuration", lambda: backend.check_launcher(api, cluster, namespace))
    yield Check("log archive", lambda: backend.check_log_archive(api, cluster, namespace))
    if connection:
        yield Check("pages", lambda: backend.check_pages(api, connection))
    yield Check(
        f"rights of {account}",
        lambda: check_rights(cluster, namespace, backend.read_launcher(api, namespace).secret),
    )
    yield Check("retries", lambda: backend.check_retries(api, cluster))
    yield Check("nodes", lambda: check_nodes(api, cluster))
    yield Check("Kubeflow Trainer", lambda: check_version(api, nodes))
    runtime = Check(f"training runtime {trainer.runtime}", lambda: check_runtime(cluster, namespace, nodes))
    yield runtime
    # Without the runtime and with one node, nobody asks for TrainJobs.
    if nodes > 1 or _finding_of(runtime, namespace).sign == GOOD:
        yield Check(
            f"rights of {account} for TrainJobs", lambda: check_training_rights(cluster, namespace, nodes)
        )


def _check_pipelines(connection: Connection, namespace: str) -> Iterator[Finding]:
    """Check Kubeflow Pipelines; `namespace` is the one in which the runs should be."""
    users = "several users" if connection.multi_user else "a single user"
    answers = f"answers at {connection.endpoint}, for {users}"
    if connection.namespace != namespace:
        answers += f": runs are in {connection.namespace}, not in {namespace}"
    yield Finding(GOOD, "Kubeflow Pipelines", answers)
    sign, detail = _check_version(connection)
    yield Finding(sign, "version of Kubeflow Pipelines", detail)
    from pipelines.kubeflow.runs import latest

    try:
        # The smallest request that needs the right to list runs.
        latest(connection, 1)
        sign, detail = GOOD, "you may list them"
    except UserError as error:
        sign, detail = BAD, str(error)
    yield Finding(sign, f"runs in {connection.namespace}", detail)


def _check_version(connection: Connection) -> Result:
    version = re.search(r"\b(\d+)\.(\d+)(\.\d+)?", connection.version())
    if version is None:
        return UNKNOWN, f"the server does not report it; {OLDEST_BACKEND} or later is needed"
    # Compared as numbers, because as text 2.9 would come after 2.16.
    if [int(version[1]), int(version[2])] < [int(part) for part in OLDEST_BACKEND.split(".")]:
        return BAD, (
            f"is {version[0]}, but compiled pipelines need {OLDEST_BACKEND} or later: install a newer one."
        )
    return GOOD, f"is {version[0]}"


def _check_store(cluster: Cluster) -> Iterator[Finding]:
    store = cluster.storage.store
    if not store:
        yield Finding(UNKNOWN, "store", "the profile names none, so each run must name one")
        return
    # The storage client reads these variables. The user's own take precedence over the profile's.
    profile = {"AWS_ENDPOINT_URL": cluster.storage.endpoint, "AWS_REGION": cluster.storage.region}
    unset = {name: value for name, value in profile.items() if value and not os.environ.get(name)}
    path = join(store, f".doctor-{secrets.token_hex(8)}")
    try:
        with variables(unset):
            write_bytes(path, b"slam-asr checks whether it may write here\n")
            delete(path)
    except UserError as error:
        sign = UNKNOWN if isinstance(error, CredentialsMissing) else BAD
        yield Finding(sign, f"store {store}", f"{error} (tried from here, with your own credentials)")
    else:
        yield Finding(
            GOOD, f"store {store}", "is writable with your own credentials; the steps use their own"
        )


def _check_images(cluster: Cluster, source: str, loaded: list[str] | None) -> Iterator[Finding]:
    try:
        image_of = images_of(source)
    except UserError as error:
        yield Finding(BAD, "images", str(error))
        return
    used = [step for step in OWN_IMAGE if step != "publish" or cluster.names_registry]
    yield from check_images([image_of[step] for step in used], loaded)


def _finding_of(check: Check, namespace: str) -> Finding:
    """Run a check; turn an error into a finding."""
    try:
        sign, detail = check.run()
    except kubernetes.ApiException as error:
        sign, detail = UNKNOWN, f"the Kubernetes API answers {error.status} {error.reason}"
        if error.status == 404:
            sign, detail = BAD, f"does not exist in {namespace}{check.remedy and f': {check.remedy}'}."
        elif error.status in (401, 403):
            detail = f"you are not allowed to read it ({error.status})"
    except urllib3.exceptions.HTTPError as error:
        sign = UNKNOWN
        detail = f"the Kubernetes API does not answer ({type(error).__name__}): check KUBECONFIG"
    except UserError as error:
        sign, detail = UNKNOWN, f"could not be checked: {error}"
    return Finding(sign, check.subject, detail)
