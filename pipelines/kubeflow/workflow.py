"""Reads a run's Argo workflow from Kubeflow Pipelines."""

from typing import Any

from pipelines.kubeflow.connection import Connection
from slam_asr.errors import ClusterError
from slam_asr.notices.workflow import Workflow, workflow_of


def read_workflow(connection: Connection, run_id: str) -> Workflow | None:
    """Read the workflow of a run.

    Returns:
        The workflow; None if it cannot be read: the server has no API v1beta1 or returns no workflows there,
        it refuses the request, or temporary failures lasted for `patience()` seconds (see `Connection.call`).
    """
    api = connection.runs.api_client

    def request() -> Any:
        return api.call_api(
            "/apis/v1beta1/runs/{run_id}",
            "GET",
            {"run_id": run_id},
            response_type="object",
            auth_settings=["Bearer"],
            _return_http_data_only=True,
        )

    try:
        return workflow_of(connection.call("read the run's workflow", request))
    except ClusterError:
        # Without the workflow, callers still know the states from v2beta1, and lack only the reasons.
        return None
