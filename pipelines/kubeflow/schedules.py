"""`python -m pipelines schedule`: runs that Kubeflow Pipelines starts at the times of a cron expression.

A scheduled run reuses the results in the store, so without new data it computes nothing.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from cronsim import CronSim, CronSimError

from pipelines.kubeflow.commands import parse_target
from pipelines.kubeflow.submit import Submission, compiled, parse_submission
from slam_asr.config.schema import nearest
from slam_asr.errors import ClusterError, ConfigurationError

if TYPE_CHECKING:
    import kfp_server_api

    from pipelines.kubeflow.connection import Connection

_FIELDS = ("second", "minute", "hour", "day of month", "month", "day of week")
_NUMBERS = r"[\d*?/,-]"
_GRAMMAR = {
    "month": rf"({_NUMBERS}|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)+",
    "day of week": r"([0-6*?/,-]|sun|mon|tue|wed|thu|fri|sat)+",
}
"""Patterns of the two fields that may contain names."""


@dataclass
class Options:
    """Options of `schedule create`, besides those of `submit`."""

    cron: str | None = None
    """times of the runs in UTC: the five fields of cron, or the six of Kubeflow (seconds first)"""
    schedule_name: str | None = None
    """name of the schedule (default: the recipe's)"""
    catch_up: bool = False
    """also start the runs that were missed during a pause"""


def create(arguments: list[str]) -> int:
    """Create a schedule, print its next times, and return the exit code."""
    description = "Start runs at the times of a cron expression. They reuse finished results in the store."
    submission = parse_submission("schedule create", description, arguments, Options)
    options = submission.options
    if not options["cron"]:
        raise ConfigurationError(
            '--cron is missing: give it as in --cron "0 3 * * *", for 3:00 UTC every day.'
        )
    cron = six_fields(options["cron"])
    times = next_times(cron)
    name = options["schedule_name"] or submission.request.resolved_recipe.name

    _create(submission, name, cron, options["catch_up"])
    explained = ", ".join(f"{field} {value}" for field, value in zip(_FIELDS, cron.split(), strict=True))
    print(f"schedule {name}: {explained} (UTC)\nnext runs: {', '.join(times)}")
    return 0


def _create(submission: Submission, name: str, cron: str, catch_up: bool) -> None:
    """Upload the pipeline, and create the schedule.

    Raises:
        ConfigurationError: a schedule has this name already.
        ClusterError: the API refuses or does not answer.
    """
    # These import kfp, which is slow.
    import kfp_server_api

    from pipelines.kubeflow.runs import submitter
    from pipelines.kubeflow.versions import experiment_and_version

    with compiled(submission) as (connection, package):
        if any(known.display_name == name for known in _all(connection)):
            raise ConfigurationError(
                f"There is a schedule {name} already: delete it first, or choose another --schedule-name."
            )
        experiment, version = experiment_and_version(connection, package, submission.options["experiment"])
        schedule = kfp_server_api.V2beta1RecurringRun(
            experiment_id=experiment,
            display_name=name,
            description=submitter(),
            pipeline_version_reference=version,
            runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=submission.parameters),
            service_account=submission.cluster.service_account,
            trigger=kfp_server_api.V2beta1Trigger(
                cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron)
            ),
            mode=kfp_server_api.RecurringRunMode.ENABLE,
            # Two runs at the same time would compute the same results.
            max_concurrency="1",
            no_catchup=not catch_up,
        )
        create = connection.client._recurring_run_api.recurring_run_service_create_recurring_run
        connection.call("create the schedule", lambda: create(schedule), once=True)


def list_all(arguments: list[str]) -> int:
    """Print all schedules, and return the exit code."""
    for known in _all(parse_target("schedule list", "List the schedules.", arguments).connection):
        cron = _cron_of(known)
        following = "" if _is_paused(known) or not cron else f"  next {_next_time(cron)}"
        state = "paused" if _is_paused(known) else "active"
        print(f"{known.display_name:<20} {state:<7} {cron or 'no cron expression'}{following}")
    return 0


def pause(arguments: list[str]) -> int:
    """Pause a schedule, and return the exit code."""
    return _change("pause", "disable", "is paused: no run starts until `schedule resume`", arguments)


def resume(arguments: list[str]) -> int:
    """Resume a paused schedule, and return the exit code."""
    return _change("resume", "enable", "is active again", arguments)


def delete(arguments: list[str]) -> int:
    """Delete a schedule, and return the exit code. Its runs and their results remain."""
    return _change("delete", "delete", "is deleted; its runs and their results remain", arguments)


def _change(command: str, action: str, outcome: str, arguments: list[str]) -> int:
    """Send a request about one schedule, and print the outcome.

    Args:
        command: the second word of the command.
        action: the name of the action in the API.
        outcome: the end of the sentence to print.
        arguments: NAME and options.
    """
    target = parse_target(f"schedule {command}", f"{command.capitalize()} a schedule.", arguments)
    connection = target.connection
    schedule = _find(connection, target.name)
    request = getattr(connection.client._recurring_run_api, f"recurring_run_service_{action}_recurring_run")
    connection.call(f"{command} the schedule", lambda: request(schedule.recurring_run_id))
    print(f"schedule {schedule.display_name} {outcome}")
    return 0


def six_fields(cron: str) -> str:
    """Return a cron expression in Kubeflow's six fields, which begin with the seconds.

    Kubeflow would read five fields as second, minute, hour, day of month and month. A 0 for the seconds is
    therefore put before five fields, so that they mean the same as in cron.

    Raises:
        ConfigurationError: it has another number of fields, or a field is wrong.
    """
    fields = cron.split()
    if len(fields) not in (5, 6):
        raise ConfigurationError(
            f'--cron "{cron}" has {len(fields)} fields: give five (minute, hour, day of month, month, day of '
            "week), or six, which begin with the seconds."
        )
    fields = ["0", *fields][-6:]
    for name, field in zip(_FIELDS, fields, strict=True):
        # Kubeflow's parser is robfig/cron 1.2. Other parsers also accept L, #, and 7 for Sunday.
        if not re.fullmatch(_GRAMMAR.get(name, f"{_NUMBERS}+"), field.lower()):
            raise ConfigurationError(
                f'--cron "{cron}": Kubeflow does not accept the {name} {field}: it takes numbers, *, ranges, '
                "lists, steps, and names of months and days; Sunday is 0."
            )
    expression = " ".join(fields)
    next_times(expression)
    return expression


def _next_time(cron: str) -> str:
    """Return the next time of a schedule, which another client may have created."""
    try:
        return next_times(cron, 1)[0]
    except ConfigurationError:
        return "unknown"


def next_times(cron: str, count: int = 3) -> list[str]:
    """Return the next times of an expression of six fields in UTC, such as `2026-12-01 03:00:00`.

    Raises:
        ConfigurationError: a field is out of bounds, or too few future times match the expression.
    """
    try:
        # cronsim does not know `?`, which means the same as `*`.
        times = list(islice(CronSim(cron.replace("?", "*"), datetime.now(UTC)), count))
    except CronSimError as error:
        raise ConfigurationError(
            f'--cron "{cron}" is not valid ({str(error).lower()}): the fields are {", ".join(_FIELDS)}.'
        ) from None
    if len(times) < count:
        raise ConfigurationError(f'--cron "{cron}" matches no date: correct the day or the month.')
    return [f"{time:%Y-%m-%d %H:%M:%S}" for time in times]


def _all(connection: "Connection") -> list["kfp_server_api.V2beta1RecurringRun"]:
    from pipelines.kubeflow.versions import pages_of

    list_page, namespace = connection.client.list_recurring_runs, connection.request_namespace
    pages = pages_of(
        connection, "list the schedules", list_page, "recurring_runs", page_size=100, namespace=namespace
    )
    return list(pages)


def _find(connection: "Connection", name: str) -> "kfp_server_api.V2beta1RecurringRun":
    """Find a schedule by its name or id.

    Raises:
        ClusterError: there is no such schedule.
    """
    known = _all(connection)
    for schedule in known:
        if name in (schedule.display_name, schedule.recurring_run_id):
            return schedule
    hint = nearest(name, [schedule.display_name for schedule in known]) or "."
    raise ClusterError(f"There is no schedule {name}{hint} `python -m pipelines schedule list` shows all.")


def _cron_of(schedule: "kfp_server_api.V2beta1RecurringRun") -> str:
    """Return the cron expression; empty for a schedule with a fixed period, which other clients create."""
    cron: Any = schedule.trigger and schedule.trigger.cron_schedule
    return (cron.cron or "") if cron else ""


def _is_paused(schedule: "kfp_server_api.V2beta1RecurringRun") -> bool:
    return "DISABLED" in str(schedule.status) or schedule.mode == "DISABLE"
