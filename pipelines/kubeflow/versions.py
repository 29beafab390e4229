"""Pipelines in Kubeflow and their versions: each package is uploaded once, and runs refer to its version."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines import asr, evaluate, sweep
from pipelines.kubeflow import check_pipeline
from pipelines.kubeflow.connection import Connection
from slam_asr import __version__
from slam_asr.steps import EVALUATION, PUBLISHING, SWEEP, TRAINING

_DESCRIPTIONS = {
    TRAINING: asr.DESCRIPTION,
    PUBLISHING: asr.DESCRIPTION,
    EVALUATION: evaluate.DESCRIPTION,
    SWEEP: sweep.DESCRIPTION,
    check_pipeline.NAME: check_pipeline.DESCRIPTION,
}


def experiment_and_version(
    connection: Connection, package: Path, experiment: str, pipeline: str
) -> tuple[str, kfp_server_api.V2beta1PipelineVersionReference]:
    """Upload a package, and create the experiment, unless they exist.

    Args:
        connection: the connection to Kubeflow Pipelines.
        package: the compiled pipeline.
        experiment: name of the experiment that groups the runs.
        pipeline: name of the pipeline.

    Returns:
        The id of the experiment, and the version of the pipeline.

    Raises:
        ClusterError: the API refuses or does not answer.
    """
    pipeline_id, version_id, _ = upload(connection, package, pipeline)
    namespace = connection.namespace if connection.multi_user else None
    # The client returns an existing experiment of that name, so this request may be retried.
    group = connection.call(
        "create the experiment", lambda: connection.client.create_experiment(experiment, namespace=namespace)
    )
    return group.experiment_id, kfp_server_api.V2beta1PipelineVersionReference(
        pipeline_id=pipeline_id, pipeline_version_id=version_id
    )


def upload(connection: Connection, package: Path, pipeline: str = TRAINING) -> tuple[str, str, str]:
    """Upload a package as a version of its pipeline, unless the same content was uploaded before.

    The version's name contains a digest of the package, by which an earlier upload is recognised.

    Args:
        connection: the connection to Kubeflow Pipelines.
        package: the compiled pipeline.
        pipeline: name of the pipeline.

    Returns:
        The ids of the pipeline and the version, and the name of the version.

    Raises:
        ClusterError: the API refuses or does not answer.
    """
    client = connection.client
    description = _DESCRIPTIONS[pipeline]
    # The digest has 48 bits. Two of n versions have the same one with a probability of about n² / 2 / 2**48:
    # for n = 1000, 2 in a billion.
    version = f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    namespace = connection.namespace if connection.multi_user else None
    pipeline_id = _find_pipeline(connection, pipeline, namespace)
    if pipeline_id is None:
        # The pipeline is created empty. If it were created from the package, this would add a version with
        # another name, besides the one that is uploaded below.
        empty = kfp_server_api.V2beta1Pipeline(
            display_name=pipeline, name=pipeline, description=description, namespace=namespace
        )
        created = connection.call(
            "create the pipeline",
            lambda: client._pipelines_api.pipeline_service_create_pipeline(empty),
            once=True,
        )
        pipeline_id = created.pipeline_id
    versions = pages_of(
        connection,
        "list the versions of the pipeline",
        lambda token: client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100),
        "pipeline_versions",
    )
    for known in versions:
        if known.display_name == version:
            return pipeline_id, known.pipeline_version_id, version
    created = connection.call(
        "upload the version of the pipeline",
        lambda: client.upload_pipeline_version(
            str(package), version, pipeline_id=pipeline_id, description=description
        ),
        once=True,
    )
    return pipeline_id, created.pipeline_version_id, version


def _find_pipeline(connection: Connection, name: str, namespace: str | None) -> str | None:
    """Return the id of the pipeline of this name, or None.

    kfp's `Client.get_pipeline_id` asks without a namespace, and a multi-user server then looks among the
    shared pipelines only.
    """
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    arguments = {"filter": json.dumps({"predicates": [predicate]})}
    if namespace:
        arguments["namespace"] = namespace
    api = connection.client._pipelines_api
    answer = connection.call("look up the pipeline", lambda: api.pipeline_service_list_pipelines(**arguments))
    return next((p.pipeline_id for p in answer.pipelines or [] if p.display_name == name), None)


def pages_of(connection: Connection, what: str, page: Callable[[str], Any], field: str) -> list[Any]:
    """Return the items of all pages of a list: the `field` of each answer to `page(token)`."""
    items: list[Any] = []
    token = ""
    while True:
        answer = connection.call(what, functools.partial(page, token))
        items += getattr(answer, field) or []
        token = answer.next_page_token
        if not token:
            return items
