"""Runs in Kubeflow Pipelines: start, find, follow and retry them."""

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines import asr, evaluate, sweep
from pipelines.kubeflow.connection import Connection, NotFound
from slam_asr import __version__
from slam_asr.config.recipe import Recipe
from slam_asr.config.schema import nearest
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.progress import clock
from slam_asr.steps import EVALUATION, STEPS, SWEEP, TRAINING

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
"""States of a run that has ended."""
_DESCRIPTIONS = {
    TRAINING: asr.DESCRIPTION,
    EVALUATION: evaluate.DESCRIPTION,
    SWEEP: sweep.DESCRIPTION,
}


@dataclass
class RunStep:
    """One step of a run in Kubeflow; a step in a loop has one `RunStep` per iteration."""

    key: str
    """Id of the task in Kubeflow, which differs between the iterations of a loop."""
    name: str
    state: str
    """State in Kubeflow, such as RUNNING; PENDING if it has none yet."""
    started: datetime | None
    ended: datetime | None
    error: str

    @property
    def seconds(self) -> float:
        """Duration so far, in seconds; 0 before the start."""
        if self.started is None:
            return 0.0
        return max(0.0, ((self.ended or datetime.now(UTC)) - self.started).total_seconds())

    def line(self) -> str:
        """Format the step for the terminal."""
        duration = f"  {clock(self.seconds)}" if self.started else ""
        error = f"  {self.error}" if self.error else ""
        return f"{self.name:<20} {self.state.lower():<10}{duration}{error}"


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
    version = f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    pipeline_id = connection.call("look up the pipeline", lambda: client.get_pipeline_id(pipeline))
    if pipeline_id is None:
        uploaded = connection.call(
            "upload the pipeline",
            lambda: client.upload_pipeline(
                str(package),
                pipeline_name=pipeline,
                description=description,
                namespace=connection.namespace if connection.multi_user else None,
            ),
            once=True,
        )
        pipeline_id = uploaded.pipeline_id
    versions = _pages(
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


def start(
    connection: Connection,
    package: Path,
    name: str,
    experiment: str,
    parameters: dict[str, Any],
    account: str,
    pipeline: str = TRAINING,
) -> str:
    """Upload a package and start a run of it.

    Args:
        connection: the connection to Kubeflow Pipelines.
        package: the compiled pipeline.
        name: display name of the run.
        experiment: name of the experiment that groups the runs.
        parameters: the pipeline parameters.
        account: service account of the pods.
        pipeline: name of the pipeline.

    Returns:
        The run's id.

    Raises:
        ClusterError: the API refuses or does not answer.
    """
    client = connection.client
    pipeline_id, version_id, _ = upload(connection, package, pipeline)
    namespace = connection.namespace if connection.multi_user else None
    # The client returns an existing experiment of that name, so this request may be retried.
    group = connection.call(
        "create the experiment", lambda: client.create_experiment(experiment, namespace=namespace)
    )
    run = connection.call(
        "start the run",
        lambda: client.run_pipeline(
            group.experiment_id,
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
    """Return the default display name of a run: recipe, models and local time."""
    models = " + ".join(
        name.rstrip("/").rpartition("/")[2] for name in (recipe.encoder.name, recipe.llm.name)
    )
    return f"{recipe.name} · {models} · {datetime.now().strftime('%Y-%m-%d %H:%M')}"


def find(connection: Connection, id_or_name: str) -> kfp_server_api.V2beta1Run:
    """Find a run by id or name; if several have the same name, return the latest.

    Raises:
        ClusterError: there is no such run.
    """
    try:
        return connection.call("read the run", lambda: connection.runs.run_service_get_run(id_or_name))
    except NotFound:
        pass
    known = latest(connection)
    for run in known:
        if id_or_name in (run.display_name, run.run_id):
            return run
    hint = nearest(id_or_name, [run.display_name for run in known] + [run.run_id for run in known]) or "."
    raise ClusterError(
        f"There is no run {id_or_name} in the namespace {connection.namespace}{hint} "
        "`python -m pipelines status` lists the latest."
    )


def latest(connection: Connection, count: int = 50) -> list[kfp_server_api.V2beta1Run]:
    """Return up to `count` runs, newest first."""
    client = connection.client
    namespace = connection.namespace if connection.multi_user else None
    answer = connection.call(
        "list the runs",
        lambda: client.list_runs(page_size=count, sort_by="created_at desc", namespace=namespace),
    )
    return answer.runs or []


def steps_of(run: kfp_server_api.V2beta1Run) -> list[RunStep]:
    """Return the pipeline's own steps in pipeline order, without the drivers and loops that Kubeflow adds."""
    details = (run.run_details.task_details if run.run_details else None) or []
    order = list(STEPS)
    steps = [
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
        steps, key=lambda s: (order.index(s.name), s.started or datetime.max.replace(tzinfo=UTC), s.key)
    )


def follow(connection: Connection, run_id: str, log_line: Callable[[str], None], interval: float) -> int:
    """Log each change of a step's state until the run has ended.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run_id: id of the run.
        log_line: called with each line.
        interval: seconds between two requests.

    Returns:
        The exit code: 0 if the run succeeded, else 1.

    Raises:
        ClusterError: temporary failures lasted for `patience()` seconds (see `Connection.call`).
    """
    logged: dict[str, str] = {}
    while True:
        run = connection.call("read the run", lambda: _complete(connection.runs.run_service_get_run(run_id)))
        for step in steps_of(run):
            if logged.get(step.key) != step.state:
                logged[step.key] = step.state
                log_line(step.line())
        if run.state in ENDED:
            break
        time.sleep(interval)
    if run.state == "SUCCEEDED":
        log_line("the run succeeded")
        return 0
    failed = [step.name for step in steps_of(run) if step.state == "FAILED"]
    where = f" in {', '.join(dict.fromkeys(failed))}" if failed else ""
    why = f": {_message(run.error)}" if _message(run.error) else ""
    log_line(
        f"the run {run.state.lower()}{where}{why}; `python -m pipelines logs {run_id}` shows its logs, "
        f"`python -m pipelines resume {run_id}` restarts the steps that did not finish"
    )
    return 1


def retry(connection: Connection, run: kfp_server_api.V2beta1Run) -> None:
    """Restart a run from the steps that failed.

    Raises:
        ConfigurationError: the run has not failed.
        ClusterError: the API refuses or does not answer.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise ConfigurationError(
            f"The run {run.display_name} is {(run.state or 'pending').lower()}, and only a failed run can be "
            "resumed: `python -m pipelines submit` starts another one, which reuses finished results."
        )
    connection.call("restart the run", lambda: connection.runs.run_service_retry_run(run.run_id), once=True)


def _complete(run: Any) -> kfp_server_api.V2beta1Run:
    """Return a run, but raise ValueError if it has no id, so that `Connection.call` repeats the request.

    A response that was truncated may still be valid JSON.
    """
    if not getattr(run, "run_id", None):
        raise ValueError("the response was truncated")
    return run


def _pages(connection: Connection, what: str, page: Callable[[str], Any], field: str) -> list[Any]:
    """Return the items of all pages of a list: the `field` of each answer to `page(token)`."""
    items: list[Any] = []
    token = ""
    while True:
        answer = connection.call(what, functools.partial(page, token))
        items += getattr(answer, field) or []
        token = answer.next_page_token
        if not token:
            return items


def _end(detail: kfp_server_api.V2beta1PipelineTaskDetail) -> datetime | None:
    # The API returns the year 1 for a step that has not ended.
    return detail.end_time if detail.end_time and detail.end_time.year > 1 else None


def _message(status: Any) -> str:
    text = getattr(status, "message", None) or ""
    return " ".join(text.split())[:300]
