"""A TrainJob is created as Trainer's own types have it, watched to its end, and never left behind.

The SDK of Kubeflow Trainer is the real one; what it talks to is a server of Kubernetes' HTTP.
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

from slam_asr.errors import UserError
from slam_asr.recipe import load_recipe
from slam_asr.stage import Outcome, run_stage, write_pointer
from slam_asr.training.nodes import nodes_of_environment
from slam_asr.trainjob import follow
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.train import command_of, train_on_nodes

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
    """What the server knows: the job that was created, and the story that its looks tell."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict] = {}
        self.created: list[dict] = []
        self.deleted: list[str] = []
        self.logs = {"node-0": "first line\n\nsecond line\n", "node-1": "of node 1\n"}
        self.story = ["Pending", "Running", "Running", "Complete"]
        """The state at each look; the last one stays."""
        self.forbidden = False
        self.runtimes = {"torch-distributed": RUNTIME}
        self.when_complete = lambda name: None
        self.looks = 0
        self.now = "Pending"

    def state(self) -> str:
        return self.story[min(self.looks, len(self.story) - 1)]


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
            fake.looks += 1
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
        self.server.fake.looks = 0
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
    """A cluster with Trainer; once the job is complete, its first node has written the record and the pointer."""
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


def test_the_request_is_what_trainers_types_know_and_all_that_was_asked_for(cluster):
    record = start()
    assert record.stage == "train" and record.metrics == {"steps": 2}
    [job] = cluster.created
    parsed = models.TrainerV1alpha1TrainJob.from_dict(job)
    # What the types do not know they would drop.
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
    expected = command_of(
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


def test_the_nodes_command_is_the_one_that_a_machine_runs_by_hand(monkeypatch):
    """Its recipe arrives whole, through the real command line, and asks for the nodes that Trainer's variables name."""
    from slam_asr import cli

    recipe = load_recipe("demo", {"training.nodes": 2, "llm.prompt": "Quotes ' \" and\nlines: ü "})
    seen = {}

    def train(
        recipe,
        train_manifest: str,
        output: str,
        feature_store: str | None = None,
        dev_manifest: str | None = None,
        overwrite: bool = False,
        **_,
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
        seen.update(recipe=recipe, output=output, feature_store=feature_store)

    monkeypatch.setattr("slam_asr.training.train.train", train)
    program, *arguments = command_of(recipe, MANIFEST, STORE, "s3://bucket/features", None)
    assert program == "slam-asr"
    cli.run(arguments[0], arguments[1:])
    assert seen == {
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
    assert nodes_of_environment(seen["recipe"].training.nodes).rank == 1


def test_lines_and_states_are_passed_on_and_the_job_is_removed(cluster, capsys):
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


def test_failure_is_the_sentence_of_the_node_that_failed(cluster, capsys):
    cluster.story = ["Running", "Running", "Failed"]
    cluster.logs = {
        "node-0": "first line\nslam-asr: error: A training process ended with code 1; its own message stands above.\n",
        "node-1": "slam-asr: error: The loss is nan at step 3 (utterances a …): lower training.learning_rate.\n",
    }
    with pytest.raises(UserError) as failure:
        start()
    assert str(failure.value) == "The loss is nan at step 3 (utterances a …): lower training.learning_rate."
    assert "node-1: slam-asr: error: The loss is nan" in capsys.readouterr().out
    assert not cluster.jobs, "what failed is removed"
    cluster.logs = {"node-0": "Killed\n", "node-1": ""}
    with pytest.raises(
        UserError, match=r"TrainJob slam-asr-train-\w+ failed: its nodes' last lines stand above"
    ):
        start()


def test_step_that_is_started_again_goes_on_with_its_job_and_replaces_one_that_failed(cluster, capsys):
    start()
    [job] = cluster.created
    name = job["metadata"]["name"]
    cluster.jobs[name] = job | {
        "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
    }
    cluster.looks = 1
    start()
    assert len(cluster.created) == 1 and "is there already: going on with it" in capsys.readouterr().out
    cluster.jobs[name] = job | {
        "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
    }
    cluster.story, cluster.looks = ["Failed"], 0
    threading.Thread(
        target=lambda: (
            _until(lambda: len(cluster.deleted) > 2),
            setattr(cluster, "story", ["Running", "Complete"]),
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
            "The account runner may not use TrainJobs in team (403): apply the component manifests/components/trainer.",
        ),
    ],
)
def test_refusal_is_one_sentence_before_anything_was_created(cluster, change, sentence):
    change(cluster)
    with pytest.raises(UserError) as refusal:
        start()
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)
    assert not cluster.created


def test_places_that_nodes_do_not_share_are_refused(cluster):
    with pytest.raises(
        UserError, match="The store is /data: training over 2 nodes needs one in object storage"
    ):
        start(store="/data")
    assert not cluster.created


def test_server_that_does_not_answer(cluster, monkeypatch, tmp_path):
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    Path(cluster.kubeconfig).write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="The Kubernetes API does not answer"):
        start()
    assert not cluster.created


def test_no_cluster_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing")
    )
    with pytest.raises(UserError, match="The Kubernetes API is not known here"):
        start()


def test_job_that_somebody_deletes_and_one_that_takes_too_long(cluster):
    cluster.story = ["Running"]
    threading.Thread(
        target=lambda: (_until(lambda: cluster.looks > 3), cluster.jobs.clear()), daemon=True
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
from tests.test_trainjob import start
start()
"""


def test_sigterm_takes_the_job_along(cluster):
    """As Kubernetes ends a pod: nobody would pay attention to the nodes any more."""
    cluster.story = ["Running"]
    code = INTERRUPTED.format(
        checkout=str(Path(__file__).resolve().parents[1]), kubeconfig=cluster.kubeconfig
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
