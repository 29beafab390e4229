"""Schedules start the runs that `submit` would, at the times that the user meant."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.kubeflow.schedules import next_times, six_fields
from slam_asr.errors import ConfigurationError

CREATE = ["schedule", "create", "demo", "--cluster", "cpu", "--corpus", "s3://b/corpus"]


@pytest.mark.slow
def test_schedule_starts_what_submit_starts(kubeflow, program):
    options = ["--training.max_steps", "7"]
    assert program("submit", *CREATE[2:], *options)[0] == 0
    code, out, err = program(*CREATE, *options, "--cron", "0 3 * * 1")
    assert code == 0, err
    [run], [schedule] = kubeflow.created, kubeflow.schedules_created
    for key in ("pipeline_version_reference", "runtime_config", "service_account", "experiment_id"):
        assert schedule[key] == run[key], key
    assert len(kubeflow.versions) == len(kubeflow.experiments) == 1
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert (schedule["max_concurrency"], schedule["no_catchup"], schedule["mode"]) == ("1", True, "ENABLE")
    first, second = out.splitlines()
    assert first == (
        "schedule demo: second 0, minute 0, hour 3, day of month *, month *, day of week 1 (UTC)"
    )
    times = [datetime.fromisoformat(time) for time in second.removeprefix("next runs: ").split(", ")]
    assert len(times) == 3 and all((t.weekday(), t.hour, t.minute) == (0, 3, 0) for t in times)
    assert timedelta() < times[0].replace(tzinfo=UTC) - datetime.now(UTC) <= timedelta(days=7)


@pytest.mark.slow
def test_schedules_are_listed_paused_resumed_and_deleted_by_name(kubeflow, program):
    for name, cron in (("nightly", "0 3 * * *"), ("every-ten-minutes", "30 */10 * * * *")):
        assert program(*CREATE, "--schedule-name", name, "--cron", cron)[0] == 0
    listed = program("schedule", "list")[1].splitlines()
    assert [line.split()[:2] for line in listed] == [["nightly", "active"], ["every-ten-minutes", "active"]]
    assert "0 0 3 * * *  next " in listed[0] and "30 */10 * * * *" in listed[1]
    assert program("schedule", "pause", "nightly")[:2] == (
        0,
        "schedule nightly is paused: no run starts until `schedule resume`\n",
    )
    assert program("schedule", "list")[1].splitlines()[0].endswith("paused  0 0 3 * * *")
    assert kubeflow.schedules["schedule-1"].status == "DISABLED"
    # Other clients can create schedules with expressions such as @daily, which Kubeflow accepts.
    kubeflow.schedules["schedule-2"].trigger["cron_schedule"]["cron"] = "@daily"
    assert program("schedule", "list")[1].splitlines()[1].endswith("active  @daily  next unknown")
    assert program("schedule", "resume", "nightly")[0] == 0
    assert "nightly              active" in program("schedule", "list")[1]
    assert program("schedule", "delete", "every-ten-minutes")[0] == 0 and list(kubeflow.schedules) == [
        "schedule-1"
    ]
    code, _, err = program("schedule", "delete", "nightyl")
    assert code == 2 and err.startswith("There is no schedule nightyl; did you mean nightly?")
    code, _, err = program(*CREATE, "--schedule-name", "nightly", "--cron", "0 3 * * *", "--catch-up")
    assert code == 2 and err.startswith("There is a schedule nightly already: delete it first")
    assert len(kubeflow.schedules_created) == 2
    assert program(*CREATE, "--cron", "0 3 * * *", "--catch-up")[0] == 0
    assert kubeflow.schedules_created[-1]["no_catchup"] is False


@pytest.mark.parametrize(
    ("cron", "sentence"),
    [
        ("", "--cron is missing"),
        ("0 3 * *", '--cron "0 3 * *" has 4 fields: give five'),
        ("0 0 0 3 * * *", '--cron "0 0 0 3 * * *" has 7 fields'),
        ("61 3 * * *", '--cron "0 61 3 * * *" is not valid (bad minute)'),
        ("0 3 * * 7", '--cron "0 3 * * 7": Kubeflow does not accept the day of week 7'),
        ("0 3 L * *", '--cron "0 3 L * *": Kubeflow does not accept the day of month L'),
        ("0 3 * * 5-1", '--cron "0 0 3 * * 5-1" is not valid (bad day-of-week)'),
        ("0 3 30 2 *", '--cron "0 0 3 30 2 *" is not valid (bad day-of-month)'),
    ],
)
def test_wrong_cron_is_one_sentence_and_nothing_is_sent(kubeflow, program, cron, sentence):
    code, out, err = program(*CREATE, "--cron", cron)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and err.startswith(sentence), err
    assert kubeflow.requests == []


def test_five_fields_begin_with_the_minute_and_six_with_the_second():
    assert six_fields(" 15 3 * * mon-fri") == "0 15 3 * * mon-fri"
    assert six_fields("*/10 0 3 ? * 0") == "*/10 0 3 ? * 0"
    assert all(time.endswith(" 03:15:00") for time in next_times(six_fields("15 3 * * *")))
    with pytest.raises(ConfigurationError):
        six_fields("* * *")
