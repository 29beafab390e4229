"""The last task of a run in a cluster: sends a notice that the run has ended.

The task runs in a pod of the run, also after a failure. Kubeflow passes it the state of the steps; the reason
for a failure comes from the API of Kubeflow Pipelines, if that answers.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import urllib3

from slam_asr.artifacts.run_records import RUN, read_steps
from slam_asr.errors import UserError
from slam_asr.notices.notice import Notice, send, webhook_url
from slam_asr.notices.reasons import failure_of
from slam_asr.notices.workflow import workflow_of
from slam_asr.progress import log_line

TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
"""File with a token for Kubeflow's API, which a multi-user Kubeflow mounts into pods that request it."""
PAUSES = (2.0, 5.0, 10.0)
"""Seconds between requests for the reason: Kubeflow copies the workflow's state a few seconds late."""
RESULTS = ("compare-runs", "score")
"""The stages whose summary can be the run's result, in order of preference, not in the order of the run."""


def notify(store: str, form: str, api: str, dashboard: str, state: str) -> None:
    """Send a notice that the run of this pod has ended. A problem with it never makes the run fail.

    One line is logged about the outcome, and another if the notice lacks the result because the store cannot
    be read. If the API does not answer, this is not logged, and the notice lacks the run's name and the
    reason of a failure.

    Args:
        store: store of the run.
        form: format of the message, slack or cloudevents.
        api: address of the API of Kubeflow Pipelines inside the cluster.
        dashboard: address of the dashboard for the link; empty for a message without one.
        state: state of the steps as Kubeflow passes it: SUCCEEDED, FAILED or CANCELLED, or still RUNNING.
    """
    run_id, url = os.environ[RUN], webhook_url()
    if not url:
        log_line("warning: no notice is sent: the secret with the webhook's URL, or its key, is missing")
        return
    notice = _from_api(api, run_id, state)
    result = _result(store, run_id) if notice.state == "succeeded" else ""
    link = f"{dashboard.rstrip('/')}/#/runs/details/{run_id}" if dashboard else ""
    send(replace(notice, result=result, link=link), form, url)


def _from_api(api: str, run_id: str, state: str) -> Notice:
    """Ask the API how the run ended, a few times if it does not show yet how its steps ended.

    Fields that the API does not answer are empty.
    """
    name = phase = step = reason = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        answer = _ask(f"{api.rstrip('/')}/apis/v1beta1/runs/{run_id}")
        name = (answer.get("run") or {}).get("name") or name
        if (workflow := workflow_of(answer)) is not None:
            phase = workflow.phase_of("exit-handler-1")
            step, reason = failure_of(workflow, run_id)
        if step or state == "SUCCEEDED" or phase == "Succeeded":
            break
    return Notice(name, run_id, _state(state, step, phase), step, reason)


def _state(state: str, step: str, phase: str) -> str:
    """Return how the run ended.

    Some versions of Kubeflow start the exit task before they update the state of the steps, which is then
    RUNNING. Argo's phase is final by then.

    Args:
        state: as for `notify`.
        step: the step that failed; empty if none did.
        phase: Argo's phase of all steps together; empty if the API does not answer.
    """
    if step or state == "FAILED" or phase in ("Failed", "Error"):
        return "failed"
    if state == "SUCCEEDED" or phase == "Succeeded":
        return "succeeded"
    return "stopped" if state in ("CANCELED", "CANCELLED") else "ended"


def _ask(address: str) -> dict[str, Any]:
    """Send one request and return the answer; empty if the API does not answer with a JSON object."""
    try:
        headers = {"Authorization": f"Bearer {TOKEN.read_text(encoding='utf-8').strip()}"}
    except OSError:
        headers = {}
    try:
        with urllib3.PoolManager(retries=False, timeout=5.0) as pool:
            answer = json.loads(pool.request("GET", address, headers=headers, redirect=False).data)
    except (urllib3.exceptions.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _result(store: str, run_id: str) -> str:
    """Return the summary of the run's result (see `RESULTS`); empty if the store cannot be read."""
    try:
        summaries = {step.stage: step.summary for step in read_steps(store, run_id)}
    except UserError as error:
        log_line(f"warning: the notice lacks the result: {error}")
        return ""
    return next((summaries[stage] for stage in RESULTS if stage in summaries), "")
