"""Runs in Kubeflow Pipelines: start, find, retry and stop them."""

import contextlib
import getpass
import itertools
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines.kubeflow.connection import Connection, NotFound
from pipelines.kubeflow.run_view import ENDED, broken_driver, is_orphaned, new_run_hint
from pipelines.kubeflow.versions import experiment_and_version, pages_of
from slam_asr.config.recipe import Recipe
from slam_asr.config.schema import nearest
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.notices.workflow import Workflow
from slam_asr.storage import digest

_LIFETIME = timedelta(hours=1)
"""How long Argo keeps an ended workflow with its pods and logs (`ttlStrategy` in Kubeflow's manifests)."""
_TIME_FORMAT = "%m-%d %H:%M"
"""Format of the time at the end of a run's name."""
_TIME_IN_NAME = re.compile(r" \d\d-\d\d \d\d:\d\d$")


def start(
    connection: Connection,
    package: Path,
    name: str,
    experiment: str,
    parameters: dict[str, Any],
    account: str,
) -> str:
    """Upload a package and start a run of it.

    Args:
        connection: the connection to Kubeflow Pipelines.
        package: the compiled pipeline.
        name: display name of the run.
        experiment: name of the experiment that groups the runs.
        parameters: the pipeline parameters.
        account: service account of the pods.

    Returns:
        The run's id.

    Raises:
        ClusterError: the API refuses or does not answer.
    """
    experiment_id, version = experiment_and_version(connection, package, experiment)
    return _create(connection, name, experiment_id, version, parameters, account)


def _create(
    connection: Connection,
    name: str,
    experiment_id: str,
    version: kfp_server_api.V2beta1PipelineVersionReference,
    parameters: dict[str, Any],
    account: str,
) -> str:
    """Start a run of an uploaded version, and return its id."""
    request = kfp_server_api.V2beta1Run(
        experiment_id=experiment_id,
        display_name=name,
        description=submitter(),
        pipeline_version_reference=version,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=parameters),
        service_account=account,
    )
    run = connection.call("start the run", lambda: connection.runs.run_service_create_run(request), once=True)
    return run.run_id


def submitter() -> str:
    """Return the description of a run: its user's name, because Kubeflow does not record who started it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # the user id of a container may have no name
        user = f"user {os.getuid()}"
    return f"submitted by {user}"


def run_name(recipe: Recipe) -> str:
    """Return the default display name of a run: recipe, a digest of its values, and local time.

    The dashboard's list cuts names after about 30 characters, so the time comes last.
    """
    values = asdict(recipe)
    return f"{recipe.name} {digest(values)[:6]} {datetime.now().strftime(_TIME_FORMAT)}"


def find(connection: Connection, id_or_name: str) -> kfp_server_api.V2beta1Run:
    """Find a run by its id, or by its name among the latest 50; of several with this name, return the latest.

    Raises:
        ClusterError: there is no such run.
    """
    with contextlib.suppress(NotFound):
        return connection.call("read the run", lambda: connection.runs.run_service_get_run(id_or_name))
    known = latest(connection)
    for run in known:
        if id_or_name in (run.display_name, run.run_id):
            return run
    hint = nearest(id_or_name, [run.display_name for run in known] + [run.run_id for run in known]) or "."
    raise ClusterError(
        f"There is no run {id_or_name} in the namespace {connection.namespace}{hint} "
        "`python -m pipelines status` lists the latest."
    )


def latest(
    connection: Connection, count: int = 50, mine: bool = False, recipe: str = ""
) -> list[kfp_server_api.V2beta1Run]:
    """Return up to `count` runs, newest first.

    Args:
        connection: the connection to Kubeflow Pipelines.
        count: maximum number of runs.
        mine: only runs that this user submitted.
        recipe: only runs of this shipped recipe; empty for all. A recipe from a file is passed as text and
            not by name, so its name cannot select runs.
    """
    # Runs are filtered here and not by the server, so a filter needs larger pages, and perhaps several.
    runs = pages_of(
        connection,
        "list the runs",
        connection.client.list_runs,
        "runs",
        page_size=max(count, 50) if mine or recipe else count,
        sort_by="created_at desc",
        namespace=connection.request_namespace,
    )
    user = submitter()
    selected = (
        run
        for run in runs
        if (run.description == user or not mine) and recipe in ("", parameters_of(run).get("recipe"))
    )
    return list(itertools.islice(selected, max(count, 0)))


def parameters_of(run: kfp_server_api.V2beta1Run) -> dict[str, Any]:
    """Return the pipeline parameters of a run."""
    return (run.runtime_config.parameters if run.runtime_config else None) or {}


def has_expired(run: kfp_server_api.V2beta1Run) -> bool:
    """Whether a run ended so long ago that Argo, as Kubeflow configures it, has deleted its workflow."""
    # The API returns the year 1970 for a run that has not ended.
    return run.state in ENDED and bool(run.finished_at) and datetime.now(UTC) - run.finished_at > _LIFETIME


def retry(
    connection: Connection,
    run: kfp_server_api.V2beta1Run,
    workflow: Workflow | None,
    launcher_changed: bool | None = None,
) -> None:
    """Restart a run from the steps that failed.

    Args:
        connection: the connection to Kubeflow Pipelines.
        run: the run.
        workflow: its workflow, if it can be read.
        launcher_changed: whether the launcher's configuration was changed after the run began; None if
            unknown.

    Raises:
        ConfigurationError: the run has not failed, or only a new run can succeed.
        ClusterError: the API refuses or does not answer.
    """
    again = new_run_hint(run.run_id)
    if is_orphaned(run, workflow):
        raise ConfigurationError(
            f"The run {run.display_name} is lost, because its workflow was deleted from the cluster: {again}."
        )
    if run.state not in ("FAILED", "CANCELED"):
        raise ConfigurationError(
            f"The run {run.display_name} is in state {(run.state or 'pending').lower()}, and only a run that "
            "failed or was stopped can be resumed: `python -m pipelines submit` starts another one, which "
            "reuses finished results."
        )
    if workflow is not None and (driver := broken_driver(workflow)) is not None:
        raise ConfigurationError(
            f"The run {run.display_name} failed in Kubeflow's driver of {driver.task}, and a restarted run "
            "keeps what its drivers resolved: mend the cause, which "
            f"`python -m pipelines status {run.run_id}` shows; then {again}."
        )
    if workflow is not None and launcher_changed and not workflow.has_finished_steps:
        raise ConfigurationError(
            f"No step of the run {run.display_name} has finished, and kfp-launcher was changed after it "
            f"began: a restarted run keeps the former pipeline root and credentials; {again}."
        )
    try:
        connection.call(
            "restart the run", lambda: connection.runs.run_service_retry_run(run.run_id), once=True
        )
    except ClusterError as error:
        reason = " Argo deletes a workflow an hour after its end, which may be the reason."
        gone = reason if has_expired(run) else ""
        raise ClusterError(f"{str(error).rstrip('.')}; {again}.{gone}") from None


def start_again(connection: Connection, run: kfp_server_api.V2beta1Run) -> tuple[str, str]:
    """Start a run of the same version of the pipeline with the same parameters.

    The new run resolves the launcher's configuration again. Its stages find the finished results of `run`.

    Returns:
        The id and the name of the new run.

    Raises:
        ConfigurationError: the run has not ended, or its version of the pipeline does not exist any more.
        ClusterError: the API refuses or does not answer.
    """
    if run.state not in ENDED and not is_orphaned(run, connection.workflow(run.run_id)):
        raise ConfigurationError(
            f"The run {run.display_name} is in state {(run.state or 'pending').lower()}, and two runs would "
            f"write the same results: `python -m pipelines stop {run.run_id}` stops it."
        )
    submit = "`python -m pipelines submit` starts another one, which reuses finished results."
    if run.pipeline_version_reference is None:
        raise ConfigurationError(f"The run {run.display_name} names no version of a pipeline: {submit}")
    name = f"{_TIME_IN_NAME.sub('', run.display_name)} {datetime.now().strftime(_TIME_FORMAT)}"
    version, parameters = run.pipeline_version_reference, parameters_of(run)
    try:
        # The other run's pipeline root is left out: a new run takes that of the launcher's configuration.
        run_id = _create(connection, name, run.experiment_id, version, parameters, run.service_account)
    except NotFound:
        raise ConfigurationError(
            f"The version of the pipeline of the run {run.display_name} does not exist any more: {submit}"
        ) from None
    return run_id, name


def stop(connection: Connection, run: kfp_server_api.V2beta1Run) -> None:
    """Stop a run. Its programs get SIGTERM, and about a second to end.

    Raises:
        ConfigurationError: the run has ended.
        ClusterError: the API refuses or does not answer.
    """
    if run.state in ENDED:
        raise ConfigurationError(f"The run {run.display_name} has already ended (state {run.state.lower()}).")
    connection.call("stop the run", lambda: connection.runs.run_service_terminate_run(run.run_id))
