"""The request for a TrainJob has Trainer's types and all settings, and one sentence explains a refusal.

Kubeflow Trainer's SDK is the real one. It talks to a small server that imitates the Kubernetes API.
"""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import ClusterError, UserError
from slam_asr.training.launch import nodes_from_environment
from slam_asr.trainjob import follow, train
from slam_asr.trainjob.request import TrainJobClient
from slam_asr.trainjob.train import node_command
from tests.trainjob.jobs import MANIFEST, PLACEMENT, STORE, UNSCHEDULABLE, as_the_api_reads, create, start

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
RIGHTS = Path(__file__).resolve().parents[2] / "manifests/components/trainer/rights.yaml"


@pytest.fixture
def in_a_pod(kubernetes, monkeypatch):
    """Let the step run in a pod of Kubeflow Pipelines."""
    monkeypatch.setenv("KFP_POD_NAME", "step-pod")
    kubernetes.objects["/api/v1/namespaces/team/pods/step-pod"] = STEP_POD


def test_the_request_matches_trainers_types_and_contains_the_settings_of_the_job(cluster):
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
    assert "a-secret-that-nobody-may-see" not in json.dumps(job)


def test_the_request_contains_the_settings_of_the_pods(kubernetes):
    create()
    [patch] = kubernetes.created[0]["spec"]["runtimePatches"]
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


def test_the_nodes_command_works_on_the_real_command_line(monkeypatch):
    """The recipe arrives unchanged, and its number of nodes matches Trainer's variables."""
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
    assert str(refusal.value).startswith(sentence) and "\n" not in refusal.value.args[0]
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
def test_a_refusal_to_create_the_job_is_explained_by_its_cause(kubernetes, status, message, sentence):
    kubernetes.refusal = (status, message)
    with pytest.raises(ClusterError) as refusal:
        create()
    assert str(refusal.value).startswith(sentence) and "\n" not in refusal.value.args[0]
    if len(message) > 900:
        assert "must not have envs for the node containers): correct what it names" in str(refusal.value)
    assert not kubernetes.created


def test_the_workflow_owns_the_job(kubernetes, in_a_pod):
    assert create()
    [job] = kubernetes.created
    # `blockOwnerDeletion` is left out, because it would need a right to the workflow's finalizers.
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
    # The SDK also tries to read Trainer's version, but does not need it.
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
