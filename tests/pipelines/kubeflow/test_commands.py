"""The commands work against fake servers, survive the servers' failures and reveal no token."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from kfp_server_api import V2beta1Pipeline

from pipelines.package_check import check_package
from slam_asr.artifacts.run_records import StepRecord
from slam_asr.steps import TRAINING
from tests.pipelines.kubeflow.fake import STEPS, TOKEN

CHECKOUT = Path(__file__).resolve().parents[3]
SUBMIT = ["submit", "demo", "--cluster", "cpu", "--corpus", "s3://b/corpus", "--training.max_steps", "7"]


@pytest.mark.slow
def test_submit_uploads_once_and_starts_a_run_with_the_requested_values(kubeflow, program, tmp_path):
    code, out, _ = program(*SUBMIT)
    assert code == 0
    name = r"run run-1: demo [0-9a-f]{6} \d\d-\d\d \d\d:\d\d\n"
    assert f"{kubeflow.address}/#/runs/details/run-1" in out and re.match(name, out), out
    # kfp's own lines about the pipeline, the experiment and the run are not printed.
    assert len(out.splitlines()) == 3, out
    [run] = kubeflow.created
    assert run["runtime_config"]["parameters"] == {
        "corpus": "s3://b/corpus",
        "store": "s3://slam-asr/runs",
        "recipe": "demo",
        "recipe_overrides": {"training.max_steps": 7},
    }
    assert run["service_account"] == "slam-asr-runner"
    assert run["pipeline_version_reference"] == {
        "pipeline_id": "pipeline-1",
        "pipeline_version_id": "version-1",
    }
    assert [(e.display_name, e.namespace) for e in kubeflow.experiments.values()] == [
        ("slam-asr", "slam-asr")
    ]
    package = tmp_path / "uploaded.yaml"
    package.write_bytes(kubeflow.packages["version-1"])
    from components import images

    check_package(package, images("slam-asr/{stage}:{version}"))
    # Only new content is uploaded as a new version, whatever the run's parameters.
    assert program(*SUBMIT, "--training.epochs", "2")[0] == 0
    assert len(kubeflow.versions) == 1 and len(kubeflow.runs) == 2 and len(kubeflow.experiments) == 1
    assert program(*SUBMIT, "--images", "registry.example/x/{stage}:2")[0] == 0
    assert program(*SUBMIT)[0] == 0
    assert len(kubeflow.versions) == 2


@pytest.mark.slow
def test_waiting_prints_state_changes_in_order_and_ends_with_the_run(kubeflow, program):
    code, out, _ = program(*SUBMIT, "--wait", "--poll", "0.01")
    assert code == 0
    printed = [line.split()[:2] for line in out.splitlines() if line.split()[0] in STEPS]
    for step in STEPS:
        states = [state for name, state in printed if name == step]
        # A short state may pass unseen between two polls, but the last one is always printed.
        assert states and states == ["pending", "running", "succeeded"][-len(states) :]
    assert "-driver" not in out and "1:01" in out and out.splitlines()[-1] == "the run succeeded"


@pytest.mark.slow
def test_failed_run_is_reported_and_can_be_resumed(kubeflow, program):
    kubeflow.fails_at = "train"
    code, out, _ = program(*SUBMIT, "--wait", "--poll", "0.01")
    assert code == 1
    assert out.splitlines()[-1].startswith("the run failed in train")
    assert "`python -m pipelines logs run-1 --step train` shows its error message" in out
    code, out, _ = program("status", "run-1", "--cluster", "cpu")
    assert code == 0 and "train                failed      1:01  the program refused its input" in out
    assert "convert-checkpoint   never reached" in out, out
    code, out, _ = program("resume", "run-1", "--wait", "--poll", "0.01")
    assert code == 0 and kubeflow.retried == ["run-1"] and out.splitlines()[-1] == "the run succeeded"
    code, _, err = program("resume", "run-1")
    assert (
        code == 2
        and "is in state succeeded, and only a run that failed or was stopped can be resumed" in err
        and kubeflow.retried == ["run-1"]
    )


@pytest.mark.slow
def test_status_lists_the_latest_runs_and_finds_a_run_by_name(kubeflow, program):
    for name in ("first", "second"):
        program(*SUBMIT, "--run-name", name)
    code, out, _ = program("status")
    assert [line.split()[-1] for line in out.splitlines()] == ["second", "first"] and code == 0
    assert program("status", "first")[1].startswith("first: ")
    code, _, err = program("status", "frist")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("There is no run frist in the namespace slam-asr; did you mean first?")


@pytest.mark.slow
def test_status_shows_what_a_run_took_if_its_store_can_be_read(kubeflow, program, tmp_path):
    program(*SUBMIT)
    profile = tmp_path / "priced.yaml"
    profile.write_text("prices: {gpu_hour: 2.5, currency: EUR}")
    folder = tmp_path / "store" / "run-records" / "run-1"
    folder.mkdir(parents=True)
    step = StepRecord("train", "s3://b/train", "done", False, 5400.0, 4, 8, 1.0)
    (folder / "train.json").write_text(json.dumps(asdict(step)))
    kubeflow.polls["run-1"] = 20
    status = ["status", "run-1", "--cluster", str(profile)]
    out = program(*status)[1]
    assert out.splitlines()[-1] == "the run succeeded" and "GPU-hours" not in out
    kubeflow.runs["run-1"].runtime_config["parameters"]["store"] = str(tmp_path / "store")
    for arguments in (status, [*status, "--wait"]):
        lines = program(*arguments)[1].splitlines()
        assert "the run succeeded" in lines
        figures = "1:30:00       6.00  15.00 EUR"
        assert lines[-2:] == [f"train     {figures}", f"this run  {figures}"]


@pytest.mark.slow
def test_runs_can_be_filtered_by_owner_and_by_recipe(kubeflow, program, monkeypatch):
    program(*SUBMIT, "--run-name", "first")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    program(*SUBMIT, "--run-name", "second")

    def names(*options: str) -> list[str]:
        return [line.split()[-1] for line in program("runs", *options)[1].splitlines()]

    assert names() == ["second", "first"] and names("--mine") == ["second"]
    assert names("--recipe", "demo", "--count", "1") == ["second"] and names("--recipe", "other") == []
    monkeypatch.delenv("LOGNAME")
    assert "second" not in names("--mine")


@pytest.mark.slow
def test_stop_ends_a_run_once_and_open_prints_its_address(kubeflow, program):
    program(*SUBMIT)
    code, out, _ = program("stop", "run-1")
    assert code == 0 and kubeflow.terminated == ["run-1"] and "`python -m pipelines resume run-1`" in out
    assert program("open", "run-1")[:2] == (0, f"{kubeflow.address}/#/runs/details/run-1\n")
    kubeflow.polls["run-1"] = 9
    assert (
        program("stop", "run-1")[2].endswith("has already ended (state succeeded).\n")
        and len(kubeflow.terminated) == 1
    )


@pytest.mark.slow
def test_single_user_kubeflow_runs_everything_in_its_own_namespace(kubeflow, program):
    kubeflow.multi_user = False
    code, out, _ = program(*SUBMIT)
    assert code == 0 and "so the run is in the namespace kubeflow: account, secret and volume must be" in out
    assert [p.namespace for p in kubeflow.pipelines.values()] == [None]
    assert "There is no run other in the namespace kubeflow" in program("status", "other")[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("multi_user", "options", "namespace"),
    [(False, [], "kubeflow"), (True, ["--namespace", "team"], "team"), (True, [], "slam-asr")],
)
def test_trainjob_is_in_the_namespace_of_the_run(
    kubeflow, kubernetes_at, program, multi_user, options, namespace
):
    kubeflow.multi_user = multi_user
    # No server listens on port 9: submitting must not need the Kubernetes API.
    kubernetes_at("http://127.0.0.1:9")
    assert program(*SUBMIT, "--training.nodes", "2", *options)[0] == 0
    [package] = kubeflow.packages.values()
    assert f'"namespace": "{namespace}"' in package.decode().replace("\\", "")


@pytest.mark.slow
def test_pipeline_of_the_namespace_is_reused_and_a_shared_one_of_the_same_name_is_not(kubeflow, program):
    kubeflow.pipelines["shared"] = V2beta1Pipeline(pipeline_id="shared", display_name=TRAINING)
    assert program(*SUBMIT)[0] == 0 and program(*SUBMIT)[0] == 0
    assert [p.namespace for p in kubeflow.pipelines.values()] == [None, "slam-asr"]
    assert [v.pipeline_id for v in kubeflow.versions.values()] == ["pipeline-2"]


@pytest.mark.slow
def test_following_survives_slow_failing_and_truncated_answers(kubeflow, program):
    program(*SUBMIT)
    kubeflow.faults = ["ok", "ok", "slow", "503", "500", "cut", "ok", "cut", "503"]
    code, out, _ = program("status", "run-1", "--wait", "--poll", "0.01")
    assert code == 0 and out.splitlines()[-1] == "the run succeeded"
    assert kubeflow.faults == []


@pytest.mark.slow
def test_submit_is_not_retried_if_the_response_is_lost(kubeflow, program):
    program(*SUBMIT)
    before = len(kubeflow.requests)
    program(*SUBMIT)
    requests = kubeflow.requests[before:]
    kubeflow.faults = ["ok"] * requests.index("POST /apis/v2beta1/runs") + ["cut"]
    code, _, err = program(*SUBMIT)
    assert (
        code == 2
        and "failed to start the run" in err
        and "check `python -m pipelines status` before you try again" in err
    )
    assert len(kubeflow.runs) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (["html"], "answers with a web page, most likely a login page: set KFP_EXISTING_TOKEN to a token"),
        (["401"], "refuses the token (401: fault 401): tokens expire; put a new one"),
        (
            ["ok", "403"],
            "You are not allowed to look up the pipeline in the namespace slam-asr (403: fault 403): check",
        ),
        (["ok", "401"], "refuses the token (401: fault 401): tokens expire; put a new one"),
        (["503"] * 40, "did not answer within 3 s of retrying (HTTP 503: fault 503): try again later."),
        (
            ["ok"] + ["503"] * 40,
            "could not look up the pipeline within 3 s of retrying (503 Service Unavailable: fault 503): try",
        ),
    ],
)
def test_refusal_is_one_sentence_and_nothing_is_created(kubeflow, program, faults, sentence):
    kubeflow.faults = faults
    code, out, err = program(*SUBMIT)
    assert (code, len(err.splitlines()), out) == (2, 1, ""), out + err
    assert sentence in err
    assert not kubeflow.pipelines and not kubeflow.runs


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["status", "", "--wait"], "RUN is empty: give a value, or leave it out."),
        (["logs", ""], "RUN is missing: "),
        (["compile", "demo", "--store", "null"], "--store is null, a path on this machine"),
        (["submit", "demo", "--sweep", "null"], "The variations null cannot be read"),
    ],
)
def test_values_of_unset_variables_and_missing_keys_are_refused(kubeflow, program, command, sentence):
    code, out, err = program(*command)
    assert (code, out) == (2, "") and sentence in err
    assert kubeflow.requests == []


def test_missing_token_is_asked_for(kubeflow, program, monkeypatch):
    monkeypatch.delenv("KFP_EXISTING_TOKEN")
    assert (
        "asks for a token (401: Unauthenticated: Request header error): put one into KFP_EXISTING_TOKEN"
        in program("status")[2]
    )


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (
            ["proxy"],
            "did not answer within 0 s of retrying (HTTP 503: upstream connect error): try again later.",
        ),
        (
            ["ok", "proxy"],
            "list the runs within 0 s of retrying (503 Service Unavailable: upstream connect error)",
        ),
    ],
)
def test_message_of_a_failing_proxy_is_shown(kubeflow, program, monkeypatch, faults, sentence):
    monkeypatch.setenv("SLAM_ASR_KFP_PATIENCE", "0")
    kubeflow.faults = faults
    assert sentence in program("status")[2]


@pytest.mark.parametrize("seconds", ["a minute", "nan", "-1"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(kubeflow, program, monkeypatch, seconds):
    # Comparisons with NaN are false, so the deadline would never pass and retries would never end.
    monkeypatch.setenv("SLAM_ASR_KFP_PATIENCE", seconds)
    assert f"SLAM_ASR_KFP_PATIENCE is '{seconds}': give a number of seconds." in program("status")[2]


def test_token_is_read_from_a_file(kubeflow, program, monkeypatch, tmp_path):
    monkeypatch.delenv("KFP_EXISTING_TOKEN")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert program("status")[0] == 0
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "nothing"))
    assert "which is not a file: put a token there" in program("status")[2]


def test_wrong_or_missing_endpoint_is_reported_in_one_sentence(kubeflow, program, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nothing = f"http://127.0.0.1:{free.getsockname()[1]}"
    for endpoint, sentence in (
        (nothing, f"Nothing answers at {nothing} ("),
        ("kubeflow.example", "The endpoint is kubeflow.example: begin it with http:// or https://"),
        (
            f"{kubeflow.address}/nowhere",
            "has no Kubeflow Pipelines 2 API at /apis/v2beta1 (HTTP 404)",
        ),
    ):
        code, _, err = program("status", "--endpoint", endpoint)
        assert (code, len(err.splitlines())) == (2, 1) and sentence in err
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    assert program("status")[2].startswith(
        "No endpoint of Kubeflow Pipelines is named: give --endpoint, set KF_PIPELINES_ENDPOINT"
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["submit"], "RECIPE is missing: python -m pipelines submit RECIPE"),
        (["submit", "demo", "--cluster", "cpu"], "The run has no corpus: give --corpus s3://…."),
        (
            ["submit", "demo", "--cluster", "cpu", "--corpus", "/data"],
            "--corpus is /data, a path on this machine",
        ),
        (
            ["submit", "demo", "--corpus", "s3://b/c", "--images", "Not/{stage} valid"],
            "'Not/build-manifest valid' cannot be the image",
        ),
        (
            ["submit", "demo", "--corpus", "s3://b/c", "--training.processes", "9"],
            "Recipe demo: training.processes is 9, but",
        ),
        (["resume"], "RUN is missing: python -m pipelines resume RUN"),
        (["stop"], "RUN is missing: python -m pipelines stop RUN"),
        (["open"], "RUN is missing: python -m pipelines open RUN"),
        (["logs"], "RUN is missing: python -m pipelines logs RUN"),
    ],
)
def test_mistake_is_reported_without_a_request_to_the_cluster(kubeflow, program, argv, sentence):
    code, _, err = program(*argv)
    assert code == 2 and err.startswith(sentence)
    assert kubeflow.requests == []


@pytest.mark.slow
def test_interrupted_waiting_does_not_stop_the_run(kubeflow):
    command = [sys.executable, "-m", "pipelines", *SUBMIT, "--wait", "--poll", "60"]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith(("build-manifest", "extract-features")):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        err.splitlines()[-1]
        == "slam-asr: the run continues in the cluster: `python -m pipelines status run-1` shows it"
    )
    assert list(kubeflow.runs) == ["run-1"] and kubeflow.terminated == []


@pytest.mark.slow
def test_logs_show_only_the_steps_of_the_run(kubeflow, cluster, program):
    program(*SUBMIT)
    code, out, _ = program("logs", "run-1")
    assert code == 0
    assert out.splitlines() == [
        "── train (a-train, running)",
        "step 1",
        "löss 2",
        "── score (a-score, pending)",
        "waiting for a node: no node has enough free memory: wait for other pods to end, add a node, or "
        "lower steps.score in the profile (0/3 nodes are available: 3 Insufficient memory.)",
    ]
    assert "score" not in program("logs", "run-1", "--step", "train", "--follow")[1]
    assert program("logs", "run-1", "--step", "trian")[2].startswith(
        "There is no step trian: --step may be open-registry, open-model, plan-sweep, build-manifest, "
    )
    assert program("logs", "run-1", "--step", "decode")[2].startswith(
        "Run run-1 has no pods for step decode in namespace slam-asr: "
    )


@pytest.mark.slow
def test_logs_that_may_not_be_read_are_an_error(kubeflow, cluster, program):
    program(*SUBMIT)
    cluster["a-train"] = (*cluster["a-train"][:2], None)
    code, out, err = program("logs", "run-1", "--step", "train")
    assert code == 2 and out == "── train (a-train, running)\n"
    assert len(err.splitlines()) == 1 and "read logs" in err


@pytest.mark.slow
def test_logs_without_a_kubeconfig_fail_with_one_sentence(kubeflow, program, monkeypatch, tmp_path):
    program(*SUBMIT)
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing")
    )
    code, _, err = program("logs", "run-1")
    assert (code, len(err.splitlines())) == (2, 1) and err.startswith(
        "No access to the Kubernetes API is configured"
    )


@pytest.mark.slow
def test_requests_contain_no_credentials(kubeflow, program, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    program(*SUBMIT)
    sent = json.dumps(kubeflow.created) + kubeflow.packages["version-1"].decode()
    assert "another-secret" not in sent and TOKEN not in sent
