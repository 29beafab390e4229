"""A TrainJob is followed to its end, and always deleted.

Kubeflow Trainer's SDK is the real one. It talks to a small server that imitates the Kubernetes API.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.check_pod import PodCheck, examine
from slam_asr.trainjob.placement import Placement
from tests.trainjob.jobs import PLACEMENT, start


def test_output_and_states_are_logged_and_the_job_is_deleted(cluster, capsys):
    start()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("first line", "second line")] == ["first line", "second line"]
    states = [
        line.rpartition(": ")[2]
        for line in lines
        if line.startswith("TrainJob slam") and line.endswith(("created", "running", "complete"))
    ]
    assert states == ["created", "running", "complete"]
    assert (
        sum(
            "waits: FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu." in line
            for line in lines
        )
        == 1
    )
    assert not cluster.jobs and len(cluster.deleted) == 1


@pytest.mark.slow
def test_a_failure_is_reported_with_the_message_of_the_failed_node(cluster, capsys):
    cluster.states = ["Running", "Running", "Failed"]
    cluster.logs = {
        "node-0": "first line\nslam-asr: error: A training process ended with code 1; its own message is "
        "above.\n",
        "node-1": "slam-asr: error: The loss is nan at step 3 (utterances a …): lower "
        "training.learning_rate.\n",
    }
    with pytest.raises(UserError) as failure:
        start()
    assert str(failure.value) == "The loss is nan at step 3 (utterances a …): lower training.learning_rate."
    assert "node-1: slam-asr: error: The loss is nan" in capsys.readouterr().out
    assert not cluster.jobs, "a failed job is deleted"
    cluster.logs = {"node-0": "Killed\n", "node-1": ""}
    with pytest.raises(
        UserError, match=r"TrainJob slam-asr-train-\w+ failed: its nodes' last lines are above"
    ):
        start()


@pytest.mark.slow
def test_a_restarted_step_follows_its_job_and_replaces_a_failed_one(cluster, capsys):
    start()
    [job] = cluster.created
    name = job["metadata"]["name"]
    cluster.jobs[name] = job | {
        "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
    }
    cluster.requests = 1
    start()
    assert len(cluster.created) == 1 and "exists already: following it" in capsys.readouterr().out
    cluster.jobs[name] = job | {
        "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
    }
    cluster.states, cluster.requests = ["Failed"], 0
    threading.Thread(
        target=lambda: (
            _until(lambda: len(cluster.deleted) > 2),
            setattr(cluster, "states", ["Running", "Complete"]),
        ),
        daemon=True,
    ).start()
    start()
    assert len(cluster.created) == 2
    other = start(recipe=load_recipe("demo", {"training.nodes": 2, "training.max_steps": 3}))
    assert other.stage == "train" and cluster.created[-1]["metadata"]["name"] != name


def _until(holds, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_job_deleted_by_others_and_one_that_takes_too_long_are_reported(cluster):
    cluster.states = ["Running"]
    threading.Thread(
        target=lambda: (_until(lambda: cluster.requests > 3), cluster.jobs.clear()), daemon=True
    ).start()
    with pytest.raises(UserError, match="was deleted while it ran"):
        start()
    with pytest.raises(UserError, match="has not ended after"):
        start(placement=Placement(**(vars(PLACEMENT) | {"timeout_hours": 1 / 3600})))
    assert not cluster.jobs


INTERRUPTED = """
import sys
sys.path.insert(0, {checkout!r})
import kubernetes.config.kube_config as kube
kube.KUBE_CONFIG_DEFAULT_LOCATION = {kubeconfig!r}
from tests.trainjob.jobs import start
start()
"""


@pytest.mark.slow
def test_sigterm_deletes_the_job(cluster):
    """Kubernetes ends a pod with SIGTERM. Without its step, nobody would follow the job."""
    cluster.states = ["Running"]
    code = INTERRUPTED.format(
        checkout=str(Path(__file__).resolve().parents[2]), kubeconfig=cluster.kubeconfig
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.strip().endswith("running"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode != 0 and "interrupted: deleting TrainJob" in rest, rest
    assert not cluster.jobs and cluster.deleted


@pytest.mark.slow
def test_check_of_several_nodes_runs_in_a_job_and_reports_the_node_that_fails(cluster):
    check = PodCheck("train", "runs", gpus=1, nodes=2, trainjob=json.dumps(vars(PLACEMENT)))
    [finding] = examine(check)
    assert finding.line() == "✓ 2 nodes: a TrainJob in team ran, and its pods reach each other"
    [job] = cluster.created
    trainer = job["spec"]["trainer"]
    *program, request = trainer["command"] + trainer["args"]
    assert program == ["python", "-m", "slam_asr.stages.check_pod"] and trainer["numNodes"] == 2
    assert PodCheck(**json.loads(request)) == PodCheck("train", "team", gpus=1, nodes=2, in_trainjob=True)
    assert cluster.deleted == [job["metadata"]["name"]] and not cluster.jobs
    cluster.states = ["Running", "Failed"]
    cluster.logs["node-1"] = "slam-asr: error: node 1: does not reach the other nodes through a:1.\n"
    [finding] = examine(check)
    assert finding.line() == "✗ 2 nodes: node 1: does not reach the other nodes through a:1."
    cluster.forbidden = True
    [finding] = examine(check)
    assert finding.line().startswith(
        "✗ 2 nodes: The account runner is not allowed to use TrainJobs in team (403)"
    )
    assert not cluster.jobs
