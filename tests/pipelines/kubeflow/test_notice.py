"""A webhook receives one message at the end of each run. A failing webhook changes nothing."""

import copy
import json
import re
import socket
from datetime import datetime

import pytest
from kfp import dsl, local
from kfp_server_api import V2beta1Run

from pipelines import asr
from pipelines.cluster import Cluster, OnExit, load_cluster
from pipelines.compile import compile_package
from pipelines.notice import with_notice
from pipelines.package_check import read_package
from pipelines.run_request import RunRequest
from slam_asr.artifacts.run_records import RUN, StepRecord, save_step
from slam_asr.config.recipe import dump_recipe, load_recipe
from slam_asr.notices import notice as notices
from slam_asr.notices.notice import Notice, send
from slam_asr.notices.workflow import parse_workflow
from slam_asr.stages import notify as stage
from tests.pipelines.kubeflow.conftest import RECORDINGS
from tests.webhook import SECRET, webhook

recorded = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="needs the recordings in ../shared")
FAILED = Notice(
    "demo <1>", "run-1", "failed", "train", "the program failed & ended", link="http://ui/#/run-1"
)


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.setattr(notices, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(stage, "PAUSES", (0.0, 0.0))
    with webhook() as server:
        monkeypatch.setenv("SLAM_ASR_WEBHOOK", server.url)
        yield server


def test_slack_gets_one_escaped_sentence_and_the_link(hook):
    assert send(FAILED, "slack", hook.url)
    [(kind, message)] = hook.messages
    assert kind == "application/json" and message == {
        "text": "demo &lt;1&gt; (run run-1) failed in train: the program failed &amp; ended.\nhttp://ui/#/run-1"
    }


def test_cloud_event_has_every_required_attribute(hook):
    send(FAILED, "cloudevents", hook.url)
    send(Notice("", "run-2", "succeeded", result="WER 9.57 % on 48 utterances"), "cloudevents", hook.url)
    (kind, failed), (_, succeeded) = hook.messages
    assert kind.startswith("application/cloudevents+json")
    for event in (failed, succeeded):
        assert event["specversion"] == "1.0" and event["source"] and event["id"]
        assert datetime.fromisoformat(event["time"]).tzinfo is not None
    assert failed["id"] != succeeded["id"]
    assert (failed["type"], failed["subject"]) == ("slam-asr.run.failed", "run-1")
    assert failed["data"]["step"] == "train" and failed["data"]["link"] == "http://ui/#/run-1"
    assert succeeded["data"]["text"] == "The run run-2 succeeded: WER 9.57 % on 48 utterances."


def test_message_is_repeated_until_it_arrives(hook):
    hook.statuses = [503, 429, 404]
    assert send(FAILED, "slack", hook.url)
    assert hook.requests == 4 and len(hook.messages) == 1


@pytest.mark.parametrize(
    ("statuses", "problem"),
    [([500] * 9, "HTTP 500"), ([302] * 9, "HTTP 302"), ([404] * 9, "HTTP 404"), (None, "NewConnectionError")],
)
def test_webhook_that_fails_causes_one_warning_without_its_url(hook, capsys, statuses, problem):
    url = hook.url
    if statuses is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/{SECRET}"
    hook.statuses = list(statuses or [])
    assert not send(FAILED, "slack", url)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and problem in out and out.startswith("warning: ") and not err
    assert SECRET not in out and hook.requests == (4 if statuses else 0) and not hook.messages


def test_url_comes_from_a_file_and_an_address_of_another_kind_is_refused(hook, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLAM_ASR_WEBHOOK")
    (tmp_path / "url").write_text(f"{hook.url}\n")
    monkeypatch.setenv("SLAM_ASR_WEBHOOK_FILE", str(tmp_path / "url"))
    assert send(FAILED, "slack", notices.webhook_url()) and len(hook.messages) == 1
    assert not send(FAILED, "slack", "ftp://host/x") and "does not begin with http" in capsys.readouterr().out


@recorded
@pytest.mark.parametrize(
    ("name", "step", "reason"),
    [
        ("step-failed-exit-1", "build-manifest", "the program failed (exit code 1)"),
        ("oom-killed", "train", "it needed more memory than its limit (OOMKilled)"),
    ],
)
def test_exit_task_reports_the_step_and_the_reason_that_status_gives(
    kubeflow, recording, program, hook, monkeypatch, tmp_path, name, step, reason
):
    run_id = recording(name)
    monkeypatch.setenv(RUN, run_id)
    # The run is still running while its exit task runs.
    kubeflow.recorded[run_id][0]["state"] = "RUNNING"
    stage.notify(str(tmp_path), "cloudevents", kubeflow.address, "https://ui/", "FAILED")
    data = hook.messages[0][1]["data"]
    assert (data["state"], data["step"]) == ("failed", step) and data["reason"].startswith(reason)
    assert data["link"] == f"https://ui/#/runs/details/{run_id}"
    kubeflow.recorded[run_id][0]["state"] = "FAILED"
    assert data["reason"] in program("status", run_id)[1]


@recorded
def test_exit_task_of_a_success_reports_the_result_in_the_store(
    kubeflow, recording, hook, monkeypatch, tmp_path
):
    monkeypatch.setenv(RUN, recording("succeeded-with-a-deleted-pod"))
    for name, summary in (("decode", "48 utterances"), ("score", "WER 2.35 % on 48 utterances")):
        save_step(StepRecord(name, f"/{name}", summary, False, 1.0, 0, 2, 1.0), str(tmp_path))
    stage.notify(str(tmp_path), "slack", kubeflow.address, "", "SUCCEEDED")
    [(_, message)] = hook.messages
    assert re.fullmatch(r"demo .* \(run .*\) succeeded: WER 2\.35 % on 48 utterances\.", message["text"])


@pytest.mark.parametrize("answer", ["refused", "nothing"])
def test_exit_task_without_the_api_reports_state_and_link(kubeflow, hook, monkeypatch, tmp_path, answer):
    monkeypatch.setenv(RUN, "run-1")
    address = kubeflow.address if answer == "refused" else "http://127.0.0.1:9"
    stage.notify(str(tmp_path), "slack", address, "https://ui", "FAILED")
    assert hook.messages[0][1]["text"] == "The run run-1 failed.\nhttps://ui/#/runs/details/run-1"


@pytest.mark.parametrize(
    ("phases", "state", "expected"),
    [
        (("Succeeded", "Succeeded"), "RUNNING", "succeeded"),
        (("Failed", "Failed"), "RUNNING", "failed"),
        (("Running", "Failed"), "RUNNING", "ended"),
        (("Running",), "SUCCEEDED", "succeeded"),
        ((), "CANCELLED", "stopped"),
        ((), "RUNNING", "ended"),
    ],
)
def test_state_comes_from_argo_where_kubeflow_has_not_updated_its_own(
    kubeflow, hook, monkeypatch, tmp_path, phases, state, expected
):
    monkeypatch.setenv(RUN, "run-1")
    nodes = {
        str(number): {"name": f"x(0).root(0).exit-handler-1{attempt}", "type": kind, "phase": phase}
        for number, (attempt, kind, phase) in enumerate(
            zip(("", "(0)"), ("Retry", "DAG"), phases, strict=False)
        )
    }
    manifest = {"metadata": {"name": "slam-asr-x"}, "status": {"nodes": nodes}}
    kubeflow.multi_user = False
    kubeflow.recorded["run-1"] = ({}, {"run": {}, "pipeline_runtime": {"workflow_manifest": manifest}})
    stage.notify(str(tmp_path), "slack", kubeflow.address, "", state)
    verb = "was stopped" if expected == "stopped" else expected
    assert hook.messages[0][1]["text"] == f"The run run-1 {verb}."


@pytest.mark.slow
def test_training_pipeline_with_the_exit_task_runs_in_kfps_own_runner(
    hook, tiny_recipe, tiny_corpus, tmp_path
):
    """The exit handler contains all steps and both loops. Its exit task runs after a failure too."""

    def place(step: str, task: dsl.PipelineTask) -> None:
        task.set_env_variable(RUN, "run-7")
        task.set_env_variable("SLAM_ASR_WEBHOOK", hook.url)

    cluster = Cluster(on_exit=OnExit("slack", dashboard="https://ui"), kubeflow_namespace="nowhere")
    pipeline = asr.build_pipeline(place, ending=with_notice(cluster, place))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "steps"))
    values = {"recipe": dump_recipe(load_recipe(str(tiny_recipe))), "store": str(tmp_path / "store")}
    pipeline(corpus=str(tiny_corpus), **values)
    with pytest.raises(RuntimeError):
        pipeline(corpus=str(tmp_path / "no corpus"), **values)
    link = "https://ui/#/runs/details/run-7"
    succeeded, failed = (message["text"] for _, message in hook.messages)
    assert re.fullmatch(rf"The run run-7 succeeded: WER [\d.]+ % on \d+ utterances\.\n{link}", succeeded)
    assert failed == f"The run run-7 failed.\n{link}"


@recorded
@pytest.mark.slow
def test_submit_sends_the_notice_of_a_run_that_could_not_start(
    kubeflow, program, hook, monkeypatch, tmp_path
):
    profile = tmp_path / "mine.yaml"
    profile.write_text("on_exit: {format: cloudevents}\nstorage: {store: 's3://bucket/runs'}")
    for api, position in (("v2beta1", 0), ("v1beta1", 1)):
        answer = json.loads((RECORDINGS / f"run-no-service-account.{api}.json").read_text())
        kubeflow.recorded.setdefault("run-1", [None, None])[position] = answer
    kubeflow.recorded["run-1"][0]["run_id"] = "run-1"
    argv = [
        "submit",
        "demo",
        "--cluster",
        str(profile),
        "--corpus",
        "s3://bucket/c",
        "--wait",
        "--poll",
        "0.01",
    ]
    code, out, err = program(*argv)
    assert code == 1 and SECRET not in out + err, err
    [(_, event)] = hook.messages
    assert event["data"]["reason"].startswith("the service account slam-asr-runner does not exist")
    assert event["data"]["state"] == "failed" and event["data"]["link"].endswith("/#/runs/details/run-1")
    assert event["data"]["reason"] in out
    package = kubeflow.packages["version-1"].decode()
    assert "slam-asr-webhook" in package and SECRET not in package
    monkeypatch.delenv("SLAM_ASR_WEBHOOK")
    kubeflow.recorded["run-2"] = kubeflow.recorded["run-1"]
    assert program(*argv)[1].splitlines()[-1].startswith("no notice was sent: the run did not send it")
    assert len(hook.messages) == 1


def test_submit_leaves_the_notice_to_the_exit_task_if_that_ran(hook):
    from pipelines.kubeflow.run_view import RunStep, RunView
    from pipelines.notice import send_if_missing

    run = V2beta1Run(run_id="r", display_name="n", state="FAILED")
    steps = [RunStep("train", "train", "failed", detail="why"), RunStep("notify", "notify", "succeeded")]
    for its_steps in (steps, steps[:1]):
        send_if_missing(RunView(run, None, its_steps), Cluster(on_exit=OnExit("slack")), "http://l", print)
    send_if_missing(RunView(run, None, steps[:1]), Cluster(), "http://l", print)
    assert [m["text"] for _, m in hook.messages] == ["n (run r) failed in train: why.\nhttp://l"]


def test_steps_and_notice_in_an_exit_handler_are_recognised():
    # The names that Argo gives to the nodes of a group and of its exit hook.
    places = {
        "(0).root(0).exit-handler-1(0).train(0).executor(0)": ("Failed", "main: OOMKilled (exit code 137)"),
        "(0).root(0).exit-handler-1.onExit.notify(0).executor(0)": ("Succeeded", ""),
    }
    nodes = {
        path: {"id": path, "name": f"slam-asr-x{path}", "type": "Pod", "phase": phase, "message": message}
        for path, (phase, message) in places.items()
    }
    manifest = {"metadata": {"name": "slam-asr-x"}, "status": {"nodes": nodes}}
    workflow = parse_workflow(json.dumps(manifest))
    assert [pods[-1].task for pods in workflow.attempts().values()] == ["train", "notify"]
    step, reason = stage.failure_of(workflow, "r")
    assert step == "train" and "more memory than its limit" in reason
    driver = copy.deepcopy(manifest)
    name = "slam-asr-x(0).root(0).exit-handler-1-driver(0)"
    driver["status"]["nodes"] = {
        "d": {"id": "d", "name": name, "type": "Pod", "phase": "Failed", "message": "Error (exit code 1)"}
    }
    _, reason = stage.failure_of(parse_workflow(json.dumps(driver)), "r")
    assert reason.startswith("Kubeflow's driver could not prepare the pipeline")


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_", [RunRequest(), RunRequest(model="s3://bucket/m")], ids=["train", "evaluate"]
)
def test_compiled_exit_task_mounts_the_optional_secret_and_waits_in_no_queue(tmp_path, request_):
    (tmp_path / "mine.yaml").write_text(
        "on_exit: {format: slack, secret: hooks, key: asr}\nqueue: {name: q}\nmodels: {claim: models}"
    )
    cluster = load_cluster(str(tmp_path / "mine.yaml"))
    spec, settings = read_package(compile_package(cluster, tmp_path / "p.yaml", request=request_))
    exit_task = spec.root.dag.tasks["notify"]
    assert list(exit_task.dependent_tasks) == ["exit-handler-1"] and len(spec.root.dag.tasks) == 2
    assert exit_task.trigger_policy.strategy == exit_task.trigger_policy.ALL_UPSTREAM_TASKS_COMPLETED
    pod = settings["exec-notify"]
    mounted = {secret.secret_name: secret.optional for secret in pod.secret_as_volume}
    assert mounted == {"slam-asr-s3": False, "hooks": True} and not pod.pvc_mount
    assert not any("kueue" in label for label in pod.pod_metadata.labels)
    assert any("kueue" in label for label in settings["exec-score"].pod_metadata.labels)
    environment = spec.deployment_spec["executors"]["exec-notify"]["container"]["env"]
    assert {"name": "SLAM_ASR_WEBHOOK_FILE", "value": "/var/run/secrets/slam-asr/webhook/asr"} in [
        dict(e) for e in environment
    ]
