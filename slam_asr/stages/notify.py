"""The last task of a run in a cluster: sends a notice that the run has ended.

The task runs in a pod of the run, after a failure too. Kubeflow passes it the state of the steps; the reason
for a failure comes from the API of Kubeflow Pipelines, if that answers.
"""

import json
import os
import time
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
"""File in which a Kubeflow for several users mounts a token for its API into pods that ask for it."""
PAUSES = (2.0, 5.0, 10.0)
"""Seconds between requests for the reason: Kubeflow copies the workflow's state a few seconds late."""
RESULTS = ("compare-runs", "score")
"""The stages whose result is the run's, the last one of the pipeline first."""


def notify(store: str, form: str, api: str, dashboard: str, state: str) -> None:
    """Send a notice that the run of this pod has ended. Problems are logged, and never fail the run.

    Args:
        store: store of the run.
        form: format of the message, slack or cloudevents.
        api: address of the API of Kubeflow Pipelines inside the cluster.
        dashboard: address of the dashboard for the link; empty for a message without one.
        state: state of the steps as Kubeflow reports it: SUCCEEDED, FAILED or CANCELLED.
    """
    run_id, url = os.environ[RUN], webhook_url()
    if not url:
        log_line("warning: no notice is sent: the secret with the webhook's URL, or its key, is missing")
        return
    name, step, reason = _from_api(api, run_id, state)
    # Kubeflow may not have updated its state yet, but a step that failed for good is certain.
    succeeded = state == "SUCCEEDED" and not step
    notice = Notice(
        name=name,
        run_id=run_id,
        state="succeeded" if succeeded else "failed" if step else (state or "failed").lower(),
        step=step,
        reason=reason,
        result=_result(store, run_id) if succeeded else "",
        link=f"{dashboard.rstrip('/')}/#/runs/details/{run_id}" if dashboard else "",
    )
    send(notice, form, url)


def _from_api(api: str, run_id: str, state: str) -> tuple[str, str, str]:
    """Return the run's name, the step that failed, and why; what the API does not answer is empty."""
    name = step = reason = ""
    for pause in (*PAUSES, None):
        answer = _ask(f"{api.rstrip('/')}/apis/v1beta1/runs/{run_id}")
        name = (answer.get("run") or {}).get("name") or name
        if (workflow := workflow_of(answer)) is not None:
            step, reason = failure_of(workflow, run_id)
        if step or state == "SUCCEEDED" or pause is None:
            break
        time.sleep(pause)
    return name, step, reason


def _ask(address: str) -> dict[str, Any]:
    """Send one request, and return the answer; empty if there is none, or if it is refused."""
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
    """Return the summary of the run's last result; empty if the store cannot be read."""
    try:
        summaries = {step.stage: step.summary for step in read_steps(store, run_id)}
    except UserError as error:
        log_line(f"warning: the notice lacks the result: {error}")
        return ""
    return next((summaries[stage] for stage in RESULTS if stage in summaries), "")
