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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.client import ApiClient

from slam_asr.artifacts.stage_record import Outcome, run_stage, write_pointer
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import ClusterError, UserError
from slam_asr.stages.check_pod import PodCheck, examine
from slam_asr.training.launch import nodes_from_environment
from slam_asr.trainjob import follow, train
from slam_asr.trainjob.placement import Placement
from slam_asr.trainjob.request import TrainJobClient, explained_refusals
from slam_asr.trainjob.train import node_command, train_on_nodes
from slam_asr.trainjob.waiting import waiting_nodes

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
RIGHTS = Path(__file__).resolve().parents[2] / "manifests/components/trainer/rights.yaml"
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
        self.refusal: tuple[int, str] | None = None
        """Status and message with which the server refuses to create a job."""
        self.pod_status: dict[int, dict] = {}
        """Status of a node's pod, if it is not the job's state; an empty one stands for no pod."""
        self.objects: dict[str, dict] = {}
        """Other objects by their path, such as the pod of the step itself."""
        self.used_rights: set[tuple[str, str]] = set()
        """Verb and resource of each request."""
        self.patches: list[dict] = []
        self.when_complete = lambda name: None
        self.requests = 0
        self.now = "Pending"

    def state(self) -> str:
        return self.states[min(self.requests, len(self.states) - 1)]


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def note(self, verb: str, path: str) -> None:
        found = re.match(rf"(?:/api/v1|{GROUP})(?:/namespaces/[^/]+)?/(\w+)(/[^/?]+)?(/\w+)?", path)
        verb = "list" if verb == "get" and not found[2] else verb
        self.server.fake.used_rights.add((verb, found[1] + (found[3] or "")))

    def do_GET(self) -> None:
        fake, path = self.server.fake, self.path.partition("?")[0]
        self.note("get", path)
        if path in fake.objects:
            return self.send(200, fake.objects[path])
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
                            "status": fake.pod_status.get(n, {"phase": phase}),
                        }
                        for n in range(2)
                        if fake.pod_status.get(n) != {}
                    ],
                },
            )
        if path == "/api/v1/namespaces/team/events":
            event = {
                "metadata": {"name": "e"},
                "involvedObject": {"kind": "Pod", "name": "node-0"},
                "type": "Warning",
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

    def do_PATCH(self) -> None:
        self.note("patch", self.path)
        patch = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.headers["content-type"] == "application/merge-patch+json"
        self.server.fake.patches.append(patch)
        self.send(200, {})

    def do_POST(self) -> None:
        self.note("create", self.path)
        job = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.fake.refusal:
            status, message = self.server.fake.refusal
            return self.send(status, {"kind": "Status", "message": message})
        self.server.fake.created.append(job)
        job = job | {
            "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
        }
        self.server.fake.jobs[job["metadata"]["name"]] = job
        self.server.fake.requests = 0
        self.send(201, job)

    def do_DELETE(self) -> None:
        self.note("delete", self.path.partition("?")[0])
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
def kubernetes(monkeypatch, tmp_path):
    """A cluster with Trainer."""
    fake = Fake()
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.fake = fake
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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


@pytest.fixture
def cluster(kubernetes, bucket):
    """A cluster with Trainer. When a job completes, its first node has written the record and the pointer."""

    def finish(name: str) -> None:
        record = run_stage(
            "train", f"{STORE}/train/{name}", {"job": name}, lambda folder: Outcome("2 steps", {"steps": 2})
        )
        write_pointer(record, f"{STORE}/train/jobs/{name}.json")

    kubernetes.when_complete = finish
    return kubernetes


def create(**settings) -> bool:
    """Create a job or find it, and return whether it is new."""
    placement = replace(PLACEMENT, **settings)
    with explained_refusals(placement):
        return follow.FollowedTrainJob(TrainJobClient(placement), "a-job").find_or_create(2, ["slam-asr"])


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


def as_the_api_reads(job):
    # Imported here, because it takes two seconds, and every worker of pytest-xdist imports this file.
    from kubeflow_trainer_api import models

    return models.TrainerV1alpha1TrainJob.from_dict(job)


def test_the_request_matches_trainers_types_and_contains_all_settings(cluster):
    record = start()
    assert record.stage == "train" and record.metrics == {"steps": 2}
    [job] = cluster.created
    parsed = as_the_api_reads(job)
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
    assert trainer["env"] == [
        {"name": "HF_TOKEN_PATH", "value": "/var/run/secrets/slam-asr/hub/HF_TOKEN"},
        {"name": "NCCL_DEBUG", "value": "INFO"},
    ]
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
        {"name": "hub", "secret": {"secretName": "hub"}},
    ]
    [container] = pod["containers"]
    assert [m["mountPath"] for m in container["volumeMounts"]] == [
        "/dev/shm",
        "/var/cache/slam-asr",
        "/var/cache/slam-asr/models",
        "/var/run/secrets/slam-asr/s3",
        "/var/run/secrets/slam-asr/hub",
    ]
    # Trainer's webhook refuses variables in this patch.
    assert "env" not in container
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
            "The account runner is not allowed to use TrainJobs in team (403): apply the component "
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


@pytest.mark.parametrize(
    ("status", "message", "sentence"),
    [
        (
            403,
            'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: '
            f"spec.runtimePatches: Invalid value: {'x' * 900}: must not have envs for the node containers",
            "The cluster does not accept the TrainJob (admission webhook "
            '"validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimePatches: Invalid',
        ),
        (
            403,
            'trainjobs.trainer.kubeflow.org "j" is forbidden: exceeded quota: team, requested: count=1',
            "The cluster does not accept the TrainJob (trainjobs.trainer.kubeflow.org",
        ),
        (
            403,
            'trainjobs.trainer.kubeflow.org is forbidden: User "system:serviceaccount:team:runner" cannot '
            'create resource "trainjobs"',
            "The account runner is not allowed to use TrainJobs in team (403): apply the component",
        ),
        (
            401,
            "Unauthorized",
            "Kubernetes refuses the token of this step's account (Unauthorized): start the",
        ),
        (422, "spec.x: Required value", "Kubeflow Trainer refuses the TrainJob (spec.x: Required value)."),
    ],
)
def test_words_of_an_admission_webhook_are_not_taken_for_missing_rights(
    kubernetes, status, message, sentence
):
    kubernetes.refusal = (status, message)
    with pytest.raises(ClusterError) as refusal:
        create()
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)
    if len(message) > 900:
        assert "must not have envs for the node containers): correct what it names" in str(refusal.value)
    assert not kubernetes.created


STEP_POD = {
    "metadata": {
        "name": "step-pod",
        "uid": "uid-of-pod",
        "ownerReferences": [
            {
                "apiVersion": "argoproj.io/v1alpha1",
                "blockOwnerDeletion": True,
                "controller": True,
                "kind": "Workflow",
                "name": "slam-asr-ncz4d",
                "uid": "8bc2e24e",
            }
        ],
    }
}
WORKFLOW = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "slam-asr-ncz4d",
    "uid": "8bc2e24e",
}


@pytest.fixture
def in_a_pod(kubernetes, monkeypatch):
    """Let the step run in a pod of Kubeflow Pipelines."""
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")
    kubernetes.objects["/api/v1/namespaces/team/pods/step-pod"] = STEP_POD


def test_the_workflow_owns_the_job_and_so_removes_it_for_certain(kubernetes, in_a_pod):
    assert create()
    [job] = kubernetes.created
    # Without blockOwnerDeletion, which would need a right to the workflow's finalizers.
    assert job["metadata"]["ownerReferences"] == [WORKFLOW]
    assert json.loads(as_the_api_reads(job).to_json()) == job


@pytest.mark.parametrize("uid", ["of another run", "8bc2e24e"])
def test_job_of_another_run_gets_this_run_as_an_owner_too(kubernetes, in_a_pod, uid):
    create()
    kubernetes.jobs["a-job"]["metadata"] |= {
        "ownerReferences": [{**WORKFLOW, "uid": uid}],
        "resourceVersion": "7",
    }
    assert not create()
    both = {"ownerReferences": [{**WORKFLOW, "uid": uid}, WORKFLOW], "resourceVersion": "7"}
    assert kubernetes.patches == ([] if uid == WORKFLOW["uid"] else [{"metadata": both}])


def test_job_without_an_owner_is_created_if_the_pod_cannot_be_read(kubernetes, monkeypatch, capsys):
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")
    assert create() and "ownerReferences" not in kubernetes.created[0]["metadata"]
    assert "the pod step-pod of this step cannot be read (Not Found), so the TrainJob gets no owner" in (
        capsys.readouterr().out
    )


def test_the_component_trainer_grants_the_rights_that_the_step_uses(kubernetes, in_a_pod):
    create()
    kubernetes.jobs["a-job"]["metadata"]["ownerReferences"] = [{"uid": "of another run"}]
    create()
    job = follow.FollowedTrainJob(TrainJobClient(PLACEMENT), "a-job")
    kubernetes.pod_status, kubernetes.states = {1: UNSCHEDULABLE}, [*3 * ["Running"], "Complete"]
    job.follow(0)
    job.delete()
    granted = {
        (verb, resource)
        for role in yaml.safe_load_all(RIGHTS.read_text())
        for rule in role.get("rules", ())
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    # The SDK reads Trainer's version too, and does without it.
    assert kubernetes.used_rights - granted == {("get", "configmaps")}
    assert granted - kubernetes.used_rights == set(), "a right that is not needed"


def test_the_job_is_created_where_the_step_runs(monkeypatch, tmp_path, capsys):
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(train, "NAMESPACE_FILE", tmp_path / "namespace")
    assert train.in_this_namespace(replace(PLACEMENT, namespace="of-the-profile")) == PLACEMENT
    assert capsys.readouterr().out.strip() == (
        "the TrainJob is created in team, where this step runs, and not in the profile's namespace "
        "of-the-profile"
    )
    assert train.in_this_namespace(PLACEMENT) == PLACEMENT and capsys.readouterr().out == ""
    monkeypatch.setattr(train, "NAMESPACE_FILE", tmp_path / "outside-of-a-cluster")
    other = replace(PLACEMENT, namespace="of-the-profile")
    assert train.in_this_namespace(other) == other


@pytest.mark.parametrize(("limit", "expected"), [("", {"cpu": "8"}), ("16", {"cpu": "16"}), ("none", {})])
def test_nodes_may_have_another_limit_of_cores_or_none(kubernetes, limit, expected):
    create(cpu_limit=limit)
    resources = kubernetes.created[0]["spec"]["trainer"]["resourcesPerNode"]
    assert resources["requests"] == PLACEMENT.resources
    without_cpu = {name: amount for name, amount in PLACEMENT.resources.items() if name != "cpu"}
    assert resources["limits"] == without_cpu | expected


def test_the_node_that_waits_is_named_while_the_others_run(kubernetes, capsys):
    create()
    kubernetes.states = ["Running", "Running", "Running", "Complete"]
    kubernetes.pod_status = {1: UNSCHEDULABLE}
    follow.FollowedTrainJob(TrainJobClient(PLACEMENT), "a-job").follow(0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "nodes run" in line]
    assert lines == [
        "TrainJob a-job: 1 of 2 nodes run; node-1 waits: Unschedulable: 0/1 nodes are available: "
        "1 Insufficient cpu."
    ]


UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes are available: 1 Insufficient cpu.",
        }
    ],
}
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def waiting_container(reason: str, message: str | None = None) -> dict:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"name": "node", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def event(kind: str, name: str, reason: str, message: str, **fields: str) -> dict:
    involved = {"kind": kind, "name": name}
    return {"metadata": {"name": "e"}, "involvedObject": involved, "reason": reason, "message": message} | (
        {"type": "Warning", "eventTime": "2026-01-02T03:04:06.000001Z"} | fields
    )


FORBIDDEN = 'Error creating: pods "j-node-0-1-" is forbidden: exceeded quota: team, requested: cpu=8'


@pytest.mark.parametrize(
    ("status", "events", "reason"),
    [
        (UNSCHEDULABLE, [], "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu."),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ErrImagePull", "no such  host")]},
            [],
            "ErrImagePull: no such host",
        ),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ContainerCreating")]},
            [event("Pod", "j-1", "FailedMount", 'secret "hub" not found')],
            'FailedMount: secret "hub" not found',
        ),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ContainerCreating")]},
            [event("Pod", "j-1", "Pulling", "pulling", type="Normal"), event("Pod", "j-2", "BackOff", "x")],
            "ContainerCreating",
        ),
        # The scheduler's events have no first time, so the SDK drops them.
        (
            {"phase": "Pending"},
            [event("Pod", "j-1", "FailedScheduling", "0/1 nodes")],
            "FailedScheduling: 0/1 nodes",
        ),
        # The SDK knows no events of the Job.
        (None, [event("Job", "j-node-0", "FailedCreate", FORBIDDEN)], f"FailedCreate: {FORBIDDEN}"),
        (
            None,
            [event("Workload", "trainjob-j-4f2a1", "Pending", "insufficient quota for cpu", type="Normal")],
            "Pending: insufficient quota for cpu",
        ),
        # An event of an earlier job of this name.
        (
            None,
            [event("Job", "j-node-0", "FailedCreate", "old", eventTime="2026-01-02T03:04:04.000001Z")],
            "it has no pod yet",
        ),
        (None, [event("Job", "other-node-0", "FailedCreate", "x")], "it has no pod yet"),
        ({"phase": "Running"}, [event("Pod", "j-1", "Unhealthy", "x")], None),
    ],
)
def test_the_reason_why_a_node_waits_comes_from_its_pod_or_from_events(status, events, reason):
    index = {"batch.kubernetes.io/job-completion-index": "1"}
    metadata = {"name": "j-1", "labels": index, "creationTimestamp": "2026-01-02T03:04:06Z"}
    pods = [{"metadata": metadata, "status": status}] if status else []
    of_node_0 = {"name": "j-0", "labels": {"batch.kubernetes.io/job-completion-index": "0"}}
    pods.append({"metadata": metadata | of_node_0, "status": {"phase": "Running"}})
    waits = waiting_nodes(Listing(pods, events), "team", "j", 2, CREATED)
    assert waits == ({reason: ["node-1"]} if reason else {})


class Listing:
    """Answers with these pods and events, as the types of the Kubernetes client."""

    def __init__(self, pods: list[dict], events: list[dict]) -> None:
        self.pods, self.events = pods, events

    def _typed(self, items: list[dict], kind: str):
        response = SimpleNamespace(data=json.dumps({"items": items}))
        return ApiClient().deserialize(response, kind)

    def list_namespaced_pod(self, namespace: str, label_selector: str):
        assert namespace == "team" and "jobset-name=j," in label_selector
        return self._typed(self.pods, "V1PodList")

    def list_namespaced_event(self, namespace: str):
        return self._typed(self.events, "CoreV1EventList")


def test_many_nodes_that_wait_for_the_same_are_one_line():
    pods = [
        {
            "metadata": {
                "name": f"j-{n}",
                "labels": {"batch.kubernetes.io/job-completion-index": str(n)},
                "creationTimestamp": "2026-01-02T03:04:06Z",
            },
            "status": UNSCHEDULABLE,
        }
        for n in range(20)
    ]
    [(reason, nodes)] = waiting_nodes(Listing(pods, []), "team", "j", 20, CREATED).items()
    assert reason.startswith("Unschedulable") and len(nodes) == 20
    assert follow.listed(nodes) == "node-0, node-1, node-2, node-3, node-4, node-5 and 14 others"
    assert follow.listed(nodes[:2]) == "node-0 and node-1" and follow.listed(nodes[:1]) == "node-0"


def test_a_store_that_nodes_do_not_share_is_refused(cluster):
    with pytest.raises(
        UserError, match="The store is /data, but training on 2 nodes needs a store in object storage"
    ):
        start(store="/data")
    assert not cluster.created


def test_a_server_that_does_not_answer_is_reported(cluster):
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    Path(cluster.kubeconfig).write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(UserError, match="The Kubernetes API does not answer"):
        start()
    assert not cluster.created


def test_a_missing_cluster_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nothing")
    )
    with pytest.raises(UserError, match="No Kubernetes API is configured here"):
        start()


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
from tests.trainjob.test_trainjob import start
start()
"""


@pytest.mark.slow
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
