"""Pipelines in Kubeflow and their versions: each package is uploaded once, and runs refer to its version."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from pipelines.kubeflow.connection import Connection
from slam_asr import __version__


def experiment_and_version(
    connection: Connection, package: Path, experiment: str
) -> tuple[str, kfp_server_api.V2beta1PipelineVersionReference]:
    """Upload a package, and create the experiment, unless they exist.

    Args:
        connection: the connection to Kubeflow Pipelines.
        package: the compiled pipeline.
        experiment: name of the experiment that groups the runs.

    Returns:
        The id of the experiment, and the version of the pipeline.

    Raises:
        ClusterError: the API refuses or does not answer.
    """
    version = _upload(connection, package)
    create, namespace = connection.client.create_experiment, connection.request_namespace
    # The client returns an existing experiment of that name, so this request may be retried.
    group = connection.call("create the experiment", lambda: create(experiment, namespace=namespace))
    return group.experiment_id, version


def _upload(connection: Connection, package: Path) -> kfp_server_api.V2beta1PipelineVersionReference:
    """Upload a package as a version of its pipeline, unless the same content was uploaded before.

    The version's name contains a digest of the package, by which an earlier upload is recognised.
    """
    client = connection.client
    # A second document, with the Kubernetes settings, may follow; only the first one is parsed.
    info = next(yaml.safe_load_all(package.read_bytes()))["pipelineInfo"]
    pipeline, description = info["name"], info["description"]
    # The digest has 48 bits. Two of n versions have the same one with a probability of about n² / 2 / 2**48:
    # for n = 1000, 2 in a billion.
    name = f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    namespace = connection.request_namespace
    pipeline_id = _find_pipeline(connection, pipeline, namespace)
    if pipeline_id is None:
        # The pipeline is created empty. If it were created from the package, this would add a version with
        # another name, besides the one that is uploaded below.
        empty = kfp_server_api.V2beta1Pipeline(
            display_name=pipeline, name=pipeline, description=description, namespace=namespace
        )
        create = client._pipelines_api.pipeline_service_create_pipeline
        pipeline_id = connection.call("create the pipeline", lambda: create(empty), once=True).pipeline_id
    list_page = functools.partial(client.list_pipeline_versions, pipeline_id)
    versions = pages_of(
        connection, "list the versions of the pipeline", list_page, "pipeline_versions", page_size=100
    )
    version = next((known for known in versions if known.display_name == name), None)
    if version is None:
        upload = functools.partial(client.upload_pipeline_version, str(package), name)
        version = connection.call(
            "upload the version of the pipeline",
            lambda: upload(pipeline_id=pipeline_id, description=description),
            once=True,
        )
    return kfp_server_api.V2beta1PipelineVersionReference(
        pipeline_id=pipeline_id, pipeline_version_id=version.pipeline_version_id
    )


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


def pages_of(
    connection: Connection, what: str, list_page: Callable[..., Any], field: str, **options: Any
) -> Iterator[Any]:
    """Yield the items of all pages of a list, and request each page only when it is needed.

    Args:
        connection: the connection to Kubeflow Pipelines.
        what: the request as a verb and its object, for messages.
        list_page: the client's function that requests a page.
        field: the field of its answers with the items.
        options: arguments of `list_page`, besides the page's token.
    """
    token: str | None = ""
    while token is not None:
        answer = connection.call(what, functools.partial(list_page, page_token=token, **options))
        yield from getattr(answer, field) or []
        token = answer.next_page_token or None
