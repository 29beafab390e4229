"""Recorded runs of a real Kubeflow Pipelines 2.17.0 are shown with state, reason and what to do."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slam_asr.notices.reasons import explain, waits_for
from slam_asr.notices.workflow import parse_workflow
from tests.pipelines.kubeflow.fake_kubernetes import KubernetesHandler, serving

RECORDINGS = Path(__file__).resolve().parents[4] / "shared" / "recordings"
recorded = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="needs the recordings in ../shared")


@recorded
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "waiting-no-room",
            [
                "build-manifest       waiting     ",
                "  for a node: no node has enough free cpu: wait for other pods to end, add a node, or lower "
                "steps.build_manifest in the profile (0/1 nodes are available: 1 Insufficient cpu)",
                "train                not started",
            ],
        ),
        (
            "waiting-image-pull",
            [
                "build-manifest       waiting     ",
                "  for its image: its image cannot be pulled: push it",
                "(ImagePullBackOff: Back-off pulling image",
            ],
        ),
        ("waiting-in-kueue", ["build-manifest       starting    "]),
        (
            "running-extraction",
            ["build-manifest       succeeded   0:13", "extract-features     running     ", "not started"],
        ),
        (
            "oom-killed",
            [
                "train                failed      ",
                "the run failed in train: it needed more memory than its limit (OOMKilled): raise "
                "steps.train.memory in the profile",
                "score                never reached",
            ],
        ),
        (
            "step-failed-exit-1",
            [
                "the run failed in build-manifest: the program failed (exit code 1): `python -m ",
                " --step build-manifest` shows why; `python -m pipelines resume ",
            ],
        ),
        (
            "no-service-account",
            [
                "the run failed: the service account slam-asr-runner does not exist in the namespace "
                "kubeflow: apply the manifests to that namespace",
                "build-manifest       never reached",
            ],
        ),
        (
            "terminated",
            [
                ": stopped\n",
                "extract-features     stopped     ",
                "  somebody stopped the run",
                "somebody stopped the run; `python -m pipelines resume ",
            ],
        ),
        ("stopped-while-pulling", [": stopped\n", "build-manifest       stopped     "]),
        (
            "succeeded-with-a-deleted-pod",
            [
                "extract-features     succeeded   ",
                "(attempt 2 of 4, because its pod was deleted, with its node or by somebody)",
                "the run succeeded",
            ],
        ),
        (
            "workflow-gone",
            [
                ": lost\n",
                "its workflow was deleted from the cluster",
                " --new` starts another one, which reuses finished results",
            ],
        ),
    ],
)
def test_status_says_what_happened_and_what_to_do(recording, program, name, lines):
    run_id = recording(name)
    code, out, _ = program("status", run_id, "--cluster", "cpu")
    assert code == 0
    for line in lines:
        assert line in out, out
    assert "-driver" not in out and "No more retries left" not in out and "deadline" not in out


@recorded
@pytest.mark.parametrize(
    ("pod", "detail"),
    [
        (
            "pod-gated-by-kueue",
            "in its Kueue queue: Kueue has not admitted the pod: `kubectl describe localqueue -n kubeflow`",
        ),
    ],
)
def test_kubernetes_explains_what_the_workflow_does_not(
    recording, kubernetes_at, program, fake_pods, pod, detail
):
    fake_pods(json.loads((RECORDINGS / f"{pod}.json").read_text()))
    out = program("status", recording("waiting-in-kueue"), "--cluster", "cpu")[1]
    assert "build-manifest       waiting     " in out and detail in out, out


@recorded
def test_following_an_ended_run_returns_its_outcome(recording, program):
    code, out, _ = program("status", recording("oom-killed"), "--wait", "--poll", "0.01")
    assert code == 1 and "the run failed in train: it needed more memory" in out.splitlines()[-1]
    code, out, _ = program("status", recording("workflow-gone"), "--wait", "--poll", "0.01")
    assert code == 1 and "the run is lost" in out


@recorded
def test_lost_run_is_not_resumed_but_started_again(recording, kubeflow, program):
    run_id = recording("workflow-gone")
    code, _, err = program("resume", run_id)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "is lost, because its workflow was deleted from the cluster: " in err
    assert f"`python -m pipelines resume {run_id} --new` starts another one" in err
    code, out, err = program("resume", run_id, "--new")
    assert code == 0, err
    assert kubeflow.retried == []
    [created], v2 = kubeflow.created, kubeflow.recorded[run_id][0]
    assert created["runtime_config"] == {"parameters": v2["runtime_config"]["parameters"]}
    for key in ("experiment_id", "pipeline_version_reference", "service_account"):
        assert created[key] == v2[key]
    assert re.fullmatch(rf"{re.escape(v2['display_name'])} \d\d-\d\d \d\d:\d\d", created["display_name"])
    assert out.splitlines() == [
        f"run run-1: {created['display_name']}",
        f"{kubeflow.address}/#/runs/details/run-1",
    ]
    # The new run has not ended.
    assert program("resume", "run-1", "--new")[0] == 2
    # After its end it can be started again too. The time at the end of its name is then replaced.
    kubeflow.polls["run-1"] = 9
    code, _, err = program("resume", "run-1", "--new")
    assert code == 0, err
    assert len(kubeflow.created[1]["display_name"]) == len(created["display_name"])


@recorded
def test_only_an_ended_run_whose_version_exists_is_started_again(recording, kubeflow, program):
    run_id = recording("running-extraction")
    err = program("resume", run_id, "--new")[2]
    assert (
        " is in state running, and two runs would write the same results: `python -m pipelines stop " in err
    )
    run_id = recording("oom-killed")
    v2 = kubeflow.recorded[run_id][0]
    kubeflow.unknown_versions.add(v2["pipeline_version_reference"]["pipeline_version_id"])
    code, _, err = program("resume", run_id, "--new")
    assert code == 2 and " does not exist any more: `python -m pipelines submit` starts another one" in err
    del v2["pipeline_version_reference"]
    assert (
        "names no version of a pipeline: `python -m pipelines submit`"
        in program("resume", run_id, "--new")[2]
    )
    assert kubeflow.created == []


@recorded
@pytest.mark.parametrize(
    ("attempts", "refused"),
    [
        # A driver that ran and failed has recorded an execution, which a restart would record a second time.
        ([("Failed", "main: Error (exit code 1)")], True),
        ([("Failed", "main: Error (exit code 1)"), ("Succeeded", "")], False),
        # The driver's pod was never created.
        ([("Error", 'pods "x" is forbidden: error looking up service account')], False),
    ],
)
def test_run_that_failed_in_a_driver_is_not_resumed(recording, kubeflow, program, attempts, refused):
    run_id = recording("oom-killed")
    nodes = kubeflow.recorded[run_id][1]["pipeline_runtime"]["workflow_manifest"]["status"]["nodes"]
    for number, (phase, message) in enumerate(attempts):
        nodes[f"driver-{number}"] = {
            "id": f"x-{number}",
            "name": f"slam-asr-fnmb2(0).root(0).score-driver({number})",
            "type": "Pod",
            "phase": phase,
            "message": message,
            "startedAt": f"2026-11-29T06:00:0{number}Z",
        }
    code, _, err = program("resume", run_id)
    new = f"`python -m pipelines resume {run_id} --new` starts another one"
    if refused:
        assert code == 2 and "failed in Kubeflow's driver of score, and a restarted run keeps what" in err
        assert new in err and kubeflow.retried == []
    else:
        assert code == 0 and kubeflow.retried == [run_id]
    assert (new in program("status", run_id)[1]) == refused


@recorded
@pytest.mark.parametrize(
    ("name", "changed", "code", "words"),
    [
        (
            "step-failed-exit-1",
            "2026-11-30T00:00:00Z",
            2,
            "and kfp-launcher was changed after it began: a rest",
        ),
        ("step-failed-exit-1", "2026-11-28T00:00:00Z", 0, "was restarted"),
        # A run with finished steps is resumed nevertheless.
        (
            "oom-killed",
            "2026-11-30T00:00:00Z",
            0,
            "that kfp-launcher named when the run began, and kfp-launcher has changed since: `",
        ),
        (
            "oom-killed",
            "",
            0,
            "still uses the pipeline root and the credentials that kfp-launcher named when the run began: `",
        ),
    ],
)
def test_resume_says_that_the_launchers_configuration_stays(
    recording, kubernetes_at, kubeflow, program, name, changed, code, words
):
    run_id = recording(name)
    metadata = {
        "name": "kfp-launcher",
        "creationTimestamp": "2026-11-01T00:00:00Z",
        "managedFields": [{"manager": "kubectl", "time": changed}],
    }
    path = "/api/v1/namespaces/kubeflow/configmaps/kfp-launcher"
    with serving(
        KubernetesHandler, pods={}, forbidden=not changed, objects={path: (200, {"metadata": metadata})}
    ) as address:
        kubernetes_at(address)
        answer, out, err = program("resume", run_id)
    assert answer == code and words in out + err
    assert kubeflow.retried == ([] if code else [run_id])
    assert ("kfp-launcher" in out + err) == (changed != "2026-11-28T00:00:00Z")


@recorded
@pytest.mark.parametrize(("hours", "says"), [(2, True), (0.5, False)])
def test_resume_says_that_the_workflow_is_deleted_an_hour_after_the_end(
    recording, kubeflow, program, hours, says
):
    run_id = recording("oom-killed")
    ended = datetime.now(UTC) - timedelta(hours=hours)
    kubeflow.recorded[run_id][0]["finished_at"] = f"{ended:%Y-%m-%dT%H:%M:%SZ}"
    code, out, _ = program("resume", run_id)
    assert code == 0 and ("it ended more than an hour ago, and Argo deletes a workflow" in out) == says
    kubeflow.retry_refusal = (404, {"message": "workflow not found"})
    err = program("resume", run_id)[2]
    assert (
        len(err.splitlines()) == 1
        and f"`python -m pipelines resume {run_id} --new` starts another one" in err
    )
    assert ("Argo deletes a workflow an hour after its end, which may be the reason." in err) == says


@recorded
def test_refusal_of_a_restart_has_the_servers_words_and_the_way_out(recording, kubeflow, program):
    run_id = recording("oom-killed")
    kubeflow.retry_refusal = (400, {"message": "Workflow must be Failed/Error to retry"})
    code, _, err = program("resume", run_id)
    assert (code, len(err.splitlines())) == (2, 1)
    assert (
        "refuses to restart the run (400: Workflow must be Failed/Error to retry); `python -m pipelines "
        in err
    )
    kubeflow.retry_refusal = (404, {"message": "run not found"})
    assert "could not restart the run (404: run not found); `python" in program("resume", run_id)[2]


@recorded
def test_states_are_shown_even_if_the_workflow_cannot_be_read(recording, kubeflow, program):
    run_id = recording("oom-killed")
    v2, v1 = kubeflow.recorded[run_id]
    kubeflow.recorded[run_id] = (v2, v1 | {"pipeline_runtime": {"workflow_manifest": "not JSON"}})
    out = program("status", run_id)[1]
    assert (
        "train                failed" in out and f"`python -m pipelines logs {run_id}` shows its logs" in out
    )


@recorded
def test_archived_logs_are_shown_when_the_pods_are_gone(recording, kubeflow, program):
    run_id = recording("step-failed-exit-1")
    workflow = parse_workflow(
        json.dumps(kubeflow.recorded[run_id][1]["pipeline_runtime"]["workflow_manifest"])
    )
    [[node]] = workflow.attempts().values()
    bucket, key = workflow.archived_log(node)
    assert (bucket, key) == (
        "mlpipeline",
        f"private-artifacts/kubeflow/slam-asr-q2n2k/2026/11/29/{workflow.pod_name(node)}/main.log",
    )
    log = (
        'time="2026-11-29T04:14:00Z" level=info msg="capturing logs" argo=true\n'
        "I1129 04:14:01.000000      12 launcher_v2.go:190] Executor Input: {\n"
        '  "inputs": {}\n'
        "}\n"
        "[KFP Executor 2026-11-29 04:14:02,000 INFO]: --component_module_path is not specified\n"
        "building the manifest of s3://b/corpus\n"
        "slam-asr: error: There is nothing at s3://b/corpus: check the bucket and the prefix.\n"
    )
    kubeflow.archive[f"{bucket}/{key}"] = log.encode()
    code, out, _ = program("logs", run_id)
    assert code == 0 and out.splitlines() == [
        f"── build-manifest ({workflow.pod_name(node)}, from Argo's archive)",
        "building the manifest of s3://b/corpus",
        "slam-asr: error: There is nothing at s3://b/corpus: check the bucket and the prefix.",
    ]
    assert program("logs", run_id, "--all")[1].splitlines()[1:] == log.splitlines()
    # The program never started, so the only lines are those of Kubeflow and Argo.
    kubeflow.archive[f"{bucket}/{key}"] = log[: log.index("building")].encode()
    assert program("logs", run_id)[1].splitlines()[1:] == log[: log.index("building")].splitlines()
    kubeflow.archive.clear()
    assert f"not readable through the dashboard: s3://{bucket}/{key}" in program("logs", run_id)[1]


@recorded
def test_logs_end_with_the_reason_of_a_failure_that_no_log_contains(recording, kubeflow, program):
    run_id = recording("oom-killed")
    manifest = json.dumps(kubeflow.recorded[run_id][1]["pipeline_runtime"]["workflow_manifest"])
    workflow = parse_workflow(manifest)
    for nodes in workflow.attempts().values():
        kubeflow.archive["/".join(workflow.archived_log(nodes[-1]))] = b"step 1\n"
    code, out, _ = program("logs", run_id)
    assert code == 0 and out.splitlines()[-1] == (
        "the run failed in train: it needed more memory than its limit (OOMKilled): raise steps.train.memory "
        "in the profile, or use smaller batches; `slam-asr plan` estimates what training needs; "
        f"`python -m pipelines resume {run_id}` restarts the steps that did not finish"
    )
    run_id = recording("no-service-account")
    code, out, err = program("logs", run_id)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert (
        "In short, the run failed: the service account slam-asr-runner does not exist in the namespace "
        in err
    )
    # A run that has not ended has no outcome.
    assert "In short" not in program("logs", recording("waiting-no-room"))[2]


@pytest.mark.parametrize(
    ("message", "sentence", "purpose"),
    [
        (
            "Unschedulable: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
            "no node has enough free nvidia.com/gpu: wait for other pods to end, or lower steps.train.gpus",
            "for a GPU",
        ),
        (
            "Unschedulable: 0/2 nodes are available: 2 node(s) had untolerated taint {gpu: present}.",
            "every suitable node has a taint {gpu: present}: name it in steps.train.tolerations",
            "for a node",
        ),
        (
            "Unschedulable: 0/2 nodes are available: 2 node(s) had untolerated taint(s).",
            "every suitable node has a taint: name it in steps.train.tolerations",
            "for a node",
        ),
        (
            "Unschedulable: 0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.",
            "no node has the labels of steps.train.node_selector: correct them in the profile",
            "for a node",
        ),
        (
            'Unschedulable: persistentvolumeclaim "slam-asr-models" not found',
            "the volume slam-asr-models does not exist in the namespace team: apply the manifests",
            "for its volume",
        ),
        (
            'pods "x" is forbidden: exceeded quota: slam-asr, requested: requests.cpu=64, used: '
            "requests.cpu=8, limited: requests.cpu=64",
            "the namespace's quota slam-asr is used up (requested: requests.cpu=64, used: requests.cpu=8, "
            "limited: requests.cpu=64): wait for other runs to end",
            "",
        ),
        (
            'CreateContainerConfigError: secret "slam-asr-s3" not found',
            "the secret slam-asr-s3 does not exist in the namespace team: create it",
            "for its secret",
        ),
        (
            "ErrImagePull: failed to pull: unauthorized: authentication required",
            "the registry refuses the image to the nodes: name a secret with its login in images.pull_",
            "for its image",
        ),
        (
            'admission webhook "validator.trainer.kubeflow.org" denied the request: env is not allowed',
            "the cluster's admission webhook validator.trainer.kubeflow.org refuses the pod: env is not all",
            "",
        ),
        (
            'pods "x" is forbidden: violates PodSecurity "restricted:latest": seccompProfile',
            "the pod security level restricted:latest of the namespace refuses the pod",
            "",
        ),
        (
            "The node was low on resource: ephemeral-storage. Threshold quantity: 1, available: 0.",
            "its node ran short of ephemeral-storage and evicted it: raise steps.train.scratch",
            "",
        ),
        (
            "Evicted: The node was low on resource: memory.",
            "its node ran short of memory and evicted it: raise steps.train.scratch or memory",
            "",
        ),
        ("Evicted", "its node evicted it, usually for lack of memory or disk: raise steps.train.memory", ""),
        ("main: Error (exit code 137)", "it needed more memory than its limit (OOMKilled)", ""),
        ("main: Error (exit code 143)", "it was asked to end (SIGTERM)", ""),
        (
            "main: Error (exit code 2)",
            "the program refused its input (exit code 2): `python -m pipelines logs run-7 --step train`",
            "",
        ),
        ("main: Error (exit code 21)", "the program failed (exit code 21)", ""),
        ("Step exceeded its deadline", "it ran longer than steps.train.timeout_hours of the profile", ""),
        ("something that nobody has seen.", "something that nobody has seen", ""),
    ],
)
def test_message_of_kubernetes_is_explained(message, sentence, purpose):
    assert explain(message, "train", "team", "run-7").startswith(sentence)
    assert waits_for(message) == purpose


def test_advice_names_the_settings_that_apply_to_a_step_without_its_own():
    assert "raise steps.score.memory" in explain("Evicted", "vary-recipe", "team", "run-7")
