"""A TrainJob is created as Trainer's types define it, followed to its end, and always deleted.

Kubeflow Trainer's SDK is the real one; it talks to a small server that imitates the Kubernetes API.
"""

import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models

from slam_asr.artifacts.stage_record import Outcome, run_stage, write_pointer
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.check_pod import PodCheck, examine
from slam_asr.training.launch import nodes_from_environment
from slam_asr.trainjob import follow
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.train import node_command, train_on_nodes

GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {"spec": {"containers": [{"name": "node", "image": "pytorch"}]}}
                            },
                        },
                    }
                ]
            }
        },
    },
}
PLACEMENT = Placement(
    namespace="team",
    image="registry.example/train:7",
    cache="/var/cache/slam-asr",
    resources={"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"},
    shared_memory="16Gi",
    scratch="100Gi",
    models_claim="models",
    storage_secret="bucket",
    token_secret="hub",
    environment={"NCCL_DEBUG": "INFO"},
    service_account="runner",
    run_as_user=1234,
    pull_secrets=["pull"],
    node_selector={"disk": "fast"},
    tolerations=[{"key": "gpu", "operator": "Exists"}],
    labels={"kueue.x-k8s.io/queue-name": "research"},
    annotations={"note": "hello"},
    timeout_hours=2,
)
MANIFEST, STORE = "s3://bucket/manifests/train.jsonl", "s3://bucket/store"


class Fake:
    """State of the server: the jobs that exist, and the states they go through."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict] = {}
        self.created: list[dict] = []
        self.deleted: list[str] = []
        self.logs = {"node-0": "first line\n\nsecond line\n", "node-1": "of node 1\n"}
        self.states = ["Pending", "Running", "Running", "Complete"]
        """The job's state at each request; the last one remains."""
        self.forbidden = False
        self.runtimes = {"torch-distributed": RUNTIME}
        self.when_complete = lambda name: None
        self.requests = 0
        self.now = "Pending"

    def state(self) -> str:
        return self.states[min(self.requests, len(self.states) - 1)]


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fake, path = self.server.fake, self.path.partition("?")[0]
        if fake.forbidden and path.startswith(GROUP):
            return self.send(403, {"message": "forbidden: no right"})
        if found := re.fullmatch(rf"{GROUP}/clustertrainingruntimes/(.+)", path):
            known = fake.runtimes.get(found[1])
            return (
                self.send(200, known)
                if known
                else self.send(404, {"message": "the server could not find the requested resource"})
            )
        if found := re.fullmatch(rf"{GROUP}/namespaces/team/trainjobs/(.+)", path):
            if found[1] not in fake.jobs:
                return self.send(404, {"message": "no such job"})
            state = fake.now = fake.state()
            fake.requests += 1
            if state == "Complete":
                fake.when_complete(found[1])
            ended = [
                {
                    "type": state,
                    "status": "True",
                    "lastTransitionTime": "2026-01-02T03:04:05Z",
                    "reason": "x",
                    "message": "x",
                }
            ]
            return self.send(
                200,
                fake.jobs[found[1]]
                | ({"status": {"conditions": ended}} if state in ("Complete", "Failed") else {}),
            )
        if found := re.fullmatch(r"/api/v1/namespaces/team/pods/(.+)/log", path):
            return self.send(200, fake.logs[found[1]], "text/plain")
        if path == "/api/v1/namespaces/team/pods":
            phase = {"Pending": "Pending", "Running": "Running", "Complete": "Succeeded", "Failed": "Failed"}[
                fake.now
            ]
            return self.send(
                200,
                {
                    "kind": "PodList",
                    "apiVersion": "v1",
                    "metadata": {},
                    "items": [
                        {
                            "metadata": {
                                "name": f"node-{n}",
                                "creationTimestamp": "2026-01-02T03:04:05Z",
                                "labels": {
                                    "jobset.sigs.k8s.io/replicatedjob-name": "node",
                                    "batch.kubernetes.io/job-completion-index": str(n),
                                },
                            },
                            "spec": {"containers": [{"name": "node", "image": "x"}]},
                            "status": {"phase": phase},
                        }
                        for n in range(2)
                    ],
                },
            )
        if path == "/api/v1/namespaces/team/events":
            event = {
                "metadata": {"name": "e"},
                "involvedObject": {"kind": "Pod", "name": "node-0"},
                "reason": "FailedScheduling",
                "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                "firstTimestamp": "2026-01-02T03:04:05Z",
            }
            return self.send(200, {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": [event]})
        if path.endswith("/kubeflow-trainer-public"):
            return self.send(
                200,
                {
                    "metadata": {"name": "kubeflow-trainer-public"},
                    "data": {"kubeflow_trainer_version": "2.1.0"},
                },
            )
        return self.send(404, {"message": f"nothing at {path}"})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.fake.created.append(job)
        job = job | {
            "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
        }
        self.server.fake.jobs[job["metadata"]["name"]] = job
        self.server.fake.requests = 0
        self.send(201, job)

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.fake.deleted.append(name)
        there = self.server.fake.jobs.pop(name, None)
        self.send(200 if there else 404, {"kind": "Status", "status": "Success"})

    def send(self, status: int, content: object, kind: str = "application/json") -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def cluster(monkeypatch, tmp_path, bucket):
    """A cluster with Trainer. When a job completes, its first node has written the record and the pointer."""
    fake = Fake()
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)

    def finish(name: str) -> None:
        record = run_stage(
            "train", f"{STORE}/train/{name}", {"job": name}, lambda folder: Outcome("2 steps", {"steps": 2})
        )
        write_pointer(record, f"{STORE}/train/jobs/{name}.json")

    fake.when_complete = finish
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.fake = fake
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [
                {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}
            ],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": "team"}}],
            "users": [{"name": "me", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
        )
        monkeypatch.setattr(follow, "POLL", 0.05)
        fake.kubeconfig = str(tmp_path / "kubeconfig")
        yield fake
        server.shutdown()


def start(**changes):
    recipe = load_recipe("demo", {"training.nodes": 2})
    values = {
        "recipe": recipe,
        "placement": PLACEMENT,
        "train_manifest": MANIFEST,
        "store": STORE,
        "dev_manifest": "s3://bucket/dev.jsonl",
    }
    return train_on_nodes(**(values | changes))


def test_the_request_matches_trainers_types_and_contains_all_settings(cluster):
    record = start()
    assert record.stage == "train" and record.metrics == {"steps": 2}
    [job] = cluster.created
    parsed = models.TrainerV1alpha1TrainJob.from_dict(job)
    # The types drop fields that they do not know.
    assert json.loads(parsed.to_json()) == job
    assert job["kind"] == "TrainJob" and re.fullmatch(r"slam-asr-train-[0-9a-f]{12}", job["metadata"]["name"])
    assert job["metadata"]["labels"] == PLACEMENT.labels and job["metadata"]["annotations"] == {
        "note": "hello"
    }
    spec = job["spec"]
    assert spec["runtimeRef"] == {
        "name": "torch-distributed",
        "kind": "ClusterTrainingRuntime",
        **{k: v for k, v in spec["runtimeRef"].items() if k == "apiGroup"},
    }
    assert spec["activeDeadlineSeconds"] == 7200
    trainer = spec["trainer"]
    assert trainer["image"] == "registry.example/train:7" and trainer["numNodes"] == 2
    assert (
        trainer["resourcesPerNode"]["requests"]
        == trainer["resourcesPerNode"]["limits"]
        == PLACEMENT.resources
    )
    assert trainer["env"] == [{"name": "NCCL_DEBUG", "value": "INFO"}]
    name = job["metadata"]["name"]
    expected = node_command(
        load_recipe("demo", {"training.nodes": 2}), MANIFEST, STORE, None, "s3://bucket/dev.jsonl"
    )
    assert trainer["command"] + trainer["args"] == [*expected, "--pointer", f"{STORE}/train/jobs/{name}.json"]
    [patch] = spec["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]["template"]
    assert replicated["name"] == "node" and template["metadata"]["labels"] == PLACEMENT.labels
    pod = template["spec"]
    assert pod["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        {"name": "scratch", "emptyDir": {"sizeLimit": "100Gi"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
        {"name": "s3", "secret": {"secretName": "bucket"}},
    ]
    [container] = pod["containers"]
    assert [m["mountPath"] for m in container["volumeMounts"]] == [
        "/dev/shm",
        "/var/cache/slam-asr",
        "/var/cache/slam-asr/models",
        "/var/run/secrets/slam-asr/s3",
    ]
    assert container["env"] == [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}}
    ]
    assert pod["serviceAccountName"] == "runner" and pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["nodeSelector"] == {"disk": "fast"} and pod["tolerations"] == [
        {"key": "gpu", "operator": "Exists"}
    ]
    assert pod["securityContext"]["runAsUser"] == 1234 and pod["securityContext"]["runAsNonRoot"]
    assert "a-secret-that-nobody-may-see" not in json.dumps(job)


def test_the_nodes_command_works_on_the_real_command_line(monkeypatch):
    """Its recipe arrives complete, and expects the number of nodes in Trainer's variables."""
    from slam_asr import cli

    recipe = load_recipe("demo", {"training.nodes": 2, "llm.prompt": "Quotes ' \" and\nlines: ü "})
    received = {}

    def train(
        recipe,
        train_manifest: str,
        output: str,
        feature_store: str | None = None,
        dev_manifest: str | None = None,
        overwrite: bool = False,
    ):
        """Train.

        Args:
            recipe: r
            train_manifest: m
            output: o
            feature_store: f
            dev_manifest: d
            overwrite: w
        """
        received.update(recipe=recipe, output=output, feature_store=feature_store)

    monkeypatch.setattr("slam_asr.stages.train.train", train)
    program, *arguments = node_command(recipe, MANIFEST, STORE, "s3://bucket/features", None)
    assert program == "slam-asr"
    cli.run(arguments[0], arguments[1:])
    assert received == {
        "recipe": recipe,
        "output": f"{STORE}/train/{{fingerprint}}",
        "feature_store": "s3://bucket/features",
    }
    for name, value in {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29400",
    }.items():
        monkeypatch.setenv(name, value)
    assert nodes_from_environment(received["recipe"].training.nodes).rank == 1


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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda fake: fake.runtimes.clear(), "The cluster has no training runtime torch-distributed ("),
        (
            lambda fake: setattr(fake, "forbidden", True),
            "The account runner may not use TrainJobs in team (403): apply the component "
            "manifests/components/trainer.",
        ),
    ],
)
def test_a_refusal_is_one_sentence_and_nothing_is_created(cluster, change, sentence):
    change(cluster)
    with pytest.raises(UserError) as refusal:
        start()
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)
    assert not cluster.created


def test_a_store_that_nodes_do_not_share_is_refused(cluster):
    with pytest.raises(
        UserError, match="The store is /data: training over 2 nodes needs one in object storage"
    ):
        start(store="/data")
    assert not cluster.created


def test_a_server_that_does_not_answer_is_reported(cluster, monkeypatch, tmp_path):
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    Path(cluster.kubeconfig).write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="The Kubernetes API does not answer"):
        start()
    assert not cluster.created


def test_a_missing_cluster_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing")
    )
    with pytest.raises(UserError, match="No Kubernetes API is configured here"):
        start()


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
from tests.trainjob.test_trainjob import start
start()
"""


def test_sigterm_deletes_the_job(cluster):
    """Kubernetes ends a pod by SIGTERM; then nobody would follow the nodes any more."""
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
    assert finding.line().startswith("✗ 2 nodes: The account runner may not use TrainJobs in team (403)")
    assert not cluster.jobs
