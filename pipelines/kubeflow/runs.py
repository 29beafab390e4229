"""A run: started, followed, found again, and started again from where it failed."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from components import ALL_RESULTS
from pipelines import TRAINING, asr, evaluate
from pipelines.kubeflow.connection import Connection, Gone
from slam_asr import __version__
from slam_asr.configuration import nearest
from slam_asr.errors import UserError
from slam_asr.progress import clock
from slam_asr.recipe import Recipe

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


@dataclass
class RunStep:
    """One step of a run, a part of it where it has several."""

    key: str
    name: str
    state: str
    started: datetime | None
    ended: datetime | None
    error: str

    @property
    def seconds(self) -> float:
        """How long it has run."""
        if self.started is None:
            return 0.0
        return max(0.0, ((self.ended or datetime.now(UTC)) - self.started).total_seconds())

    def line(self) -> str:
        """The step for people."""
        time_taken = f"  {clock(self.seconds)}" if self.started else ""
        return (
            f"{self.name:<20} {self.state.lower():<10}{time_taken}{'  ' + self.error if self.error else ''}"
        )


def upload(connection: Connection, package: Path, pipeline: str = TRAINING) -> tuple[str, str, str]:
    """Have the pipeline there: its content is uploaded once, under a name that holds its digest → ids of pipeline and version, name of the version."""
    client = connection.client
    description = asr.DESCRIPTION if pipeline == TRAINING else evaluate.DESCRIPTION
    version = f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    pipeline_id = connection.call("look for the pipeline", lambda: client.get_pipeline_id(pipeline))
    if pipeline_id is None:
        made = connection.call(
            "take the pipeline",
            lambda: client.upload_pipeline(
                str(package),
                pipeline_name=pipeline,
                description=description,
                namespace=connection.namespace if connection.multi_user else None,
            ),
            once=True,
        )
        pipeline_id = made.pipeline_id
    versions = _pages(
        connection,
        "list the pipeline's versions",
        lambda token: client.list_pipeline_versions(pipeline_id, page_token=token, page_size=100),
        "pipeline_versions",
    )
    for known in versions:
        if known.display_name == version:
            return pipeline_id, known.pipeline_version_id, version
    made = connection.call(
        "take the pipeline's version",
        lambda: client.upload_pipeline_version(
            str(package), version, pipeline_id=pipeline_id, description=description
        ),
        once=True,
    )
    return pipeline_id, made.pipeline_version_id, version


def start(
    connection: Connection,
    package: Path,
    name: str,
    experiment: str,
    parameters: dict[str, Any],
    account: str,
    pipeline: str = TRAINING,
) -> str:
    """Upload and run → the run's id.

    Raises:
        UserError: the API refuses one of it.
    """
    client = connection.client
    pipeline_id, version_id, _ = upload(connection, package, pipeline)
    namespace = connection.namespace if connection.multi_user else None
    made = connection.call(
        "make the experiment", lambda: client.create_experiment(experiment, namespace=namespace)
    )
    run = connection.call(
        "start the run",
        lambda: client.run_pipeline(
            made.experiment_id,
            name,
            params=parameters,
            pipeline_id=pipeline_id,
            version_id=version_id,
            enable_caching=False,
            service_account=account,
        ),
        once=True,
    )
    return run.run_id


def run_name(recipe: Recipe) -> str:
    """What a run says of itself: recipe, models, and when."""
    models = " + ".join(
        name.rstrip("/").rpartition("/")[2] for name in (recipe.encoder.name, recipe.llm.name)
    )
    return f"{recipe.name} · {models} · {datetime.now().strftime('%Y-%m-%d %H:%M')}"


def find(connection: Connection, wanted: str) -> kfp_server_api.V2beta1Run:
    """A run by id or name; the latest where several have the name.

    Raises:
        UserError: there is none.
    """
    try:
        return connection.call("show the run", lambda: connection.runs.run_service_get_run(wanted))
    except Gone:
        pass
    known = latest(connection)
    for run in known:
        if wanted in (run.display_name, run.run_id):
            return run
    hint = nearest(wanted, [run.display_name for run in known] + [run.run_id for run in known]) or "."
    raise UserError(
        f"There is no run {wanted} in the namespace {connection.namespace}{hint} `python -m pipelines status` lists the latest."
    )


def latest(connection: Connection, count: int = 50) -> list[kfp_server_api.V2beta1Run]:
    """The latest runs, newest first."""
    client = connection.client
    namespace = connection.namespace if connection.multi_user else None
    answer = connection.call(
        "list the runs",
        lambda: client.list_runs(page_size=count, sort_by="created_at desc", namespace=namespace),
    )
    return answer.runs or []


def steps_of(run: kfp_server_api.V2beta1Run) -> list[RunStep]:
    """The pipeline's own steps, in their order; what Kubeflow runs around them is left out."""
    details = (run.run_details.task_details if run.run_details else None) or []
    order = list(ALL_RESULTS)
    found = [
        RunStep(
            d.task_id or d.display_name,
            d.display_name,
            d.state or "PENDING",
            d.start_time,
            _end(d),
            _message(d.error),
        )
        for d in details
        if d.display_name in order
    ]
    return sorted(
        found, key=lambda s: (order.index(s.name), s.started or datetime.max.replace(tzinfo=UTC), s.key)
    )


def follow(connection: Connection, run_id: str, log_line: Callable[[str], None], every: float) -> int:
    """Tell what changes until the run has ended → the exit code: 0 where it succeeded.

    Raises:
        UserError: the API is gone for longer than one waits for it.
    """
    told: dict[str, str] = {}
    while True:
        run = connection.call("show the run", lambda: _whole(connection.runs.run_service_get_run(run_id)))
        for step in steps_of(run):
            if told.get(step.key) != step.state:
                told[step.key] = step.state
                log_line(step.line())
        if run.state in ENDED:
            break
        time.sleep(every)
    if run.state == "SUCCEEDED":
        log_line("the run succeeded")
        return 0
    failed = [step.name for step in steps_of(run) if step.state == "FAILED"]
    where = f" in {', '.join(dict.fromkeys(failed))}" if failed else ""
    why = f": {_message(run.error)}" if _message(run.error) else ""
    log_line(
        f"the run {run.state.lower()}{where}{why}; `python -m pipelines logs {run_id}` shows the steps' lines, `resume` goes on from there"
    )
    return 1


def retry(connection: Connection, run: kfp_server_api.V2beta1Run) -> None:
    """Start a run again from the steps that failed.

    Raises:
        UserError: it has not failed.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise UserError(
            f"The run {run.display_name} is {(run.state or 'pending').lower()}, and only one that failed can be resumed: `python -m pipelines submit` starts another, which finds what is done."
        )
    connection.call(
        "start the run again", lambda: connection.runs.run_service_retry_run(run.run_id), once=True
    )


def _whole(run: Any) -> kfp_server_api.V2beta1Run:
    """Refuse half an answer: without an id it is none."""
    if not getattr(run, "run_id", None):
        raise ValueError("the answer was cut off")
    return run


def _pages(connection: Connection, what: str, page: Callable[[str], Any], field: str) -> list[Any]:
    found, token = [], ""
    while True:
        answer = connection.call(what, lambda token=token: page(token))
        found += getattr(answer, field) or []
        token = answer.next_page_token
        if not token:
            return found


def _end(detail: kfp_server_api.V2beta1PipelineTaskDetail) -> datetime | None:
    # The API writes the year 1 where there is no end yet.
    return detail.end_time if detail.end_time and detail.end_time.year > 1 else None


def _message(status: Any) -> str:
    text = getattr(status, "message", None) or ""
    return " ".join(text.split())[:300]
