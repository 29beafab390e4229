"""doctor finds what is missing, explains what to do, and shows no secret."""

import base64
from pathlib import Path

import pytest
import yaml

from pipelines.cluster import load_cluster
from pipelines.kubeflow.backend import _needed_rights
from tests.pipelines.kubeflow.fake_kubernetes import KubernetesHandler, RegistryHandler, serving

CHECKOUT = Path(__file__).resolve().parents[3]
PROFILE = """
namespace: team
service_account: runner
images: {{names: "{registry}/team/{{stage}}:7"}}
storage: {{store: "s3://bucket/store", secret: bucket-secret}}
models: {{claim: models, token_secret: hub}}
queue: {{name: research}}
on_exit: {{format: slack, secret: hooks}}
steps:
  train:
    gpus: 4
    node_selector: {{disk: fast}}
    tolerations: [{{key: gpu, operator: Exists, effect: NoSchedule}}]
  decode: {{gpus: 1, tolerations: [{{key: gpu, operator: Exists}}]}}
"""
NAMESPACE = "/api/v1/namespaces/team"


def node(gpus: int, labels: dict, taints: list) -> dict:
    return {
        "metadata": {"name": f"node-{gpus}", "labels": labels},
        "spec": {"taints": taints},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus), "cpu": "8"}},
    }


def objects() -> dict:
    """The objects of a cluster in which nothing is missing, by path: status and content."""
    encoded = {key: base64.b64encode(b"nobody-may-see-this").decode() for key in ("accesskey", "secretkey")}
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    return {
        f"{NAMESPACE}/serviceaccounts/runner": (200, {"metadata": {"name": "runner"}}),
        f"{NAMESPACE}/secrets/bucket-secret": (200, {"metadata": {"name": "bucket-secret"}, "data": encoded}),
        f"{NAMESPACE}/secrets/hub": (
            200,
            {"metadata": {"name": "hub"}, "data": {"HF_TOKEN": encoded["accesskey"]}},
        ),
        f"{NAMESPACE}/secrets/hooks": (
            200,
            {"metadata": {"name": "hooks"}, "data": {"url": encoded["accesskey"]}},
        ),
        f"{NAMESPACE}/configmaps/kfp-launcher": (
            200,
            {"metadata": {"name": "kfp-launcher"}, "data": {"defaultPipelineRoot": "minio://mlpipeline/v2"}},
        ),
        f"{NAMESPACE}/persistentvolumeclaims/models": (
            200,
            {
                "metadata": {"name": "models"},
                "spec": {"accessModes": ["ReadWriteMany"]},
                "status": {"phase": "Bound", "capacity": {"storage": "100Gi"}},
            },
        ),
        "/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/research": (
            200,
            {"metadata": {"name": "research"}},
        ),
        "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed": (
            200,
            {"metadata": {"name": "torch-distributed"}},
        ),
        "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap": (
            200,
            {
                "metadata": {"name": "workflow-controller-configmap"},
                "data": {
                    "workflowDefaults": "spec:\n  templateDefaults:\n    retryStrategy:\n      limit: '2'\n"
                    "      retryPolicy: OnError\n"
                },
            },
        ),
        "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public": (
            200,
            {
                "metadata": {"name": "kubeflow-trainer-public"},
                "data": {"kubeflow_trainer_version": "v2.3.0"},
            },
        ),
        "/api/v1/nodes": (200, {"items": [node(0, {}, []), node(4, {"disk": "fast"}, [taint])]}),
    }


@pytest.fixture
def doctor(kubeflow, bucket, kubernetes_at, program, tmp_path):
    """Run doctor on a complete cluster after `change`; return the exit code and the output."""

    def run(change=lambda objects, manifests: None, forbidden=False, profile=PROFILE, options=()):
        served, manifests = (
            objects(),
            {
                f"team/{stage}:7": 200
                for stage in ("build-manifest", "extract-features", "train", "convert-checkpoint", "decode")
            },
        )
        change(served, manifests)
        with (
            serving(KubernetesHandler, pods={}, objects=served, forbidden=forbidden) as kubernetes,
            serving(RegistryHandler, manifests=manifests) as registry,
        ):
            kubernetes_at(kubernetes)
            (tmp_path / "profile.yaml").write_text(profile.format(registry=registry.removeprefix("http://")))
            code, out, err = program("doctor", "--cluster", str(tmp_path / "profile.yaml"), *options)
        assert err == "" and "nobody-may-see" not in out
        return code, out.replace(registry.removeprefix("http://"), "registry")

    return run


def test_complete_cluster_has_no_problems(doctor, bucket):
    code, out = doctor()
    assert code == 0, out
    lines = out.splitlines()
    assert len(lines) == 23 and all(line.startswith("✓ ") for line in lines[:-1]), out
    assert "retries: Argo retries lost, drained and preempted pods, but not failing exit codes" in out
    assert "Kubeflow Trainer: is v2.3.0" in out
    assert "nodes: 2 accept pods, and each step with GPUs fits on one" in out
    assert list(bucket.objects.all()) == [], "the test object is deleted"


def without(path):
    return lambda served, manifests: served.pop(path)


def changed(path, **values):
    def change(served, manifests):
        served[path] = (200, served[path][1] | values)

    return change


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (without(f"{NAMESPACE}/serviceaccounts/runner"), "✗ service account runner: does not exist in team"),
        (without(f"{NAMESPACE}/secrets/bucket-secret"), "✗ secret bucket-secret: does not exist in team"),
        (
            changed(f"{NAMESPACE}/secrets/bucket-secret", data={"key": ""}),
            "✗ secret bucket-secret: contains key, but must contain accesskey and secretkey",
        ),
        (changed(f"{NAMESPACE}/secrets/hub", data={}), "✗ secret hub: has no key HF_TOKEN"),
        (
            changed(f"{NAMESPACE}/secrets/hooks", data={"URL": ""}),
            "✗ secret hooks: has no key url: store the webhook's URL under that name.",
        ),
        (without(f"{NAMESPACE}/configmaps/kfp-launcher"), "✗ launcher configuration: does not exist in team"),
        (
            lambda served, manifests: served.update(denied=["get secrets bucket-secret", "get pods"]),
            "✗ rights of runner: it is not allowed to get pods, get secrets bucket-secret in team: "
            "`kubectl apply -n team -k manifests/runner` grants what runs need.",
        ),
        (
            changed(
                "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public",
                data={"kubeflow_trainer_version": "v2.1.0"},
            ),
            "✗ Kubeflow Trainer: is v2.1.0, but training on several nodes needs 2.2 or later",
        ),
        (
            without(f"{NAMESPACE}/persistentvolumeclaims/models"),
            "✗ model volume models: does not exist in team",
        ),
        (
            without("/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/research"),
            "✗ queue research: does not exist in team",
        ),
        (
            changed(
                "/api/v1/nodes", items=[node(4, {"disk": "fast"}, [{"key": "other", "effect": "NoSchedule"}])]
            ),
            "✗ nodes: no node has all of this for train: 4 × nvidia.com/gpu (the maximum is 4)",
        ),
        (
            changed("/api/v1/nodes", items=[node(8, {}, [])]),
            "✗ nodes: no node has all of this for train: 4 × nvidia.com/gpu (the maximum is 8)",
        ),
        (
            changed("/api/v1/nodes", items=[node(3, {"disk": "fast"}, [])]),
            "✗ nodes: no node has all of this for train: 4 × nvidia.com/gpu (the maximum is 3)",
        ),
        (
            lambda served, manifests: manifests.pop("team/train:7"),
            "✗ image registry/team/train:7: does not exist",
        ),
    ],
)
def test_each_problem_is_named(doctor, change, finding):
    code, out = doctor(change)
    assert code == 1 and finding in out, out
    assert (
        sum(line.startswith("✗") for line in out.splitlines()) == 1
        and out.splitlines()[-1] == "1 problem found"
    )


def test_launcher_with_kubeflows_own_storage_needs_its_secret(doctor):
    secret = f"{NAMESPACE}/secrets/mlpipeline-minio-artifact"

    def without_root(served, manifests):
        served[f"{NAMESPACE}/configmaps/kfp-launcher"] = (200, {"metadata": {"name": "kfp-launcher"}})
        served[secret] = (200, {"metadata": {"name": "mlpipeline-minio-artifact"}})
        served["denied"] = ["get secrets mlpipeline-minio-artifact"]

    code, out = doctor(without_root)
    assert code == 1 and "artifacts go to Kubeflow's own storage" in out, out
    assert "✗ rights of runner: it is not allowed to get secrets mlpipeline-minio-artifact in team" in out
    code, out = doctor(lambda *given: (without_root(*given), given[0].pop(secret)))
    assert code == 1 and "✗ launcher configuration: does not exist in team" in out


@pytest.mark.parametrize(
    ("version", "exit_code", "finding"),
    [
        ("2.16.1", 0, "✓ version of Kubeflow Pipelines: is 2.16.1"),
        ("2.9.0", 1, "✗ version of Kubeflow Pipelines: is 2.9.0, but compiled pipelines need 2.16"),
        ("unknown", 0, "– version of Kubeflow Pipelines: the server does not report it; 2.16 or later"),
    ],
)
def test_version_of_kubeflow_pipelines_is_checked(doctor, kubeflow, version, exit_code, finding):
    kubeflow.version = version
    code, out = doctor(lambda served, manifests: None)
    assert code == exit_code and finding in out, out


def test_single_user_kubeflow_is_checked_in_its_own_namespace(doctor, kubeflow):
    kubeflow.multi_user = False

    def in_kubeflow(served, manifests):
        for path in [path for path in served if path.startswith(NAMESPACE)]:
            served[path.replace(NAMESPACE, "/api/v1/namespaces/kubeflow")] = served.pop(path)
        path = "/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/research"
        served[path.replace("team", "kubeflow")] = served.pop(path)

    code, out = doctor(in_kubeflow)
    assert code == 0, out
    assert "for a single user: runs are in kubeflow, not in team" in out


def test_multi_user_dashboard_shows_pages_only_from_kubeflows_own_storage(doctor, kubeflow):
    root = changed(
        f"{NAMESPACE}/configmaps/kfp-launcher", data={"defaultPipelineRoot": "s3://bucket/artifacts"}
    )
    code, out = doctor(root)
    assert code == 0, out
    assert (
        "– pages: a multi-user dashboard shows pages only from minio://mlpipeline/…, but artifacts "
        "go to s3://bucket/artifacts: remove defaultPipelineRoot (`kubectl -n team edit configmap kfp-"
    ) in out


@pytest.mark.parametrize(
    ("name", "node_name"), [("slam-asr/", "docker.io/slam-asr/"), ("", "docker.io/library/")]
)
def test_image_without_a_registry_must_be_loaded_into_the_nodes(doctor, name, node_name):
    loaded = [
        {"names": [f"{node_name}{stage}:7"]}
        for stage in ("build-manifest", "extract-features", "train", "convert-checkpoint")
    ]

    def load(served, manifests):
        served["/api/v1/nodes"][1]["items"][0]["status"]["images"] = loaded

    code, out = doctor(load, profile=PROFILE.replace("{registry}/team/", name))
    assert code == 1 and f"✓ image {name}train:7: is loaded into the nodes" in out, out
    assert f"✗ image {name}decode:7: the image of decode has no registry in its name" in out
    assert "load it into the nodes (`make images LOAD=kind`)" in out
    code, out = doctor(load, profile=PROFILE.replace("{registry}/team/", name), forbidden=True)
    assert code == 0 and f"– image {name}train:7: the image of train has no registry in its name" in out


def test_kubeflow_without_trainer_and_in_another_namespace_has_no_problem(doctor):
    def remove(served, manifests):
        for path in [path for path in served if "trainer" in path or "workflow-controller" in path]:
            del served[path]

    code, out = doctor(remove)
    assert code == 0, out
    assert "– Kubeflow Trainer: is not installed in kubeflow-system; only multi-node training needs it" in out
    assert "– retries: kubeflow has no workflow-controller-configmap of Argo: write the namespace of " in out


def test_what_cannot_be_read_is_unknown(doctor):
    code, out = doctor(forbidden=True)
    assert code == 0 and out.count("you are not allowed to read it (403)") == 13, out
    code, out = doctor(lambda served, manifests: manifests.update({"team/decode:7": 403}))
    assert code == 0
    assert (
        "– image registry/team/decode:7: could not be checked, because the registry requires a login" in out
    )


@pytest.mark.slow
def test_several_nodes_without_trainer_are_rejected_before_anything_is_created(
    doctor, kubeflow, kubernetes_at, program
):
    code, out = doctor(
        without("/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed")
    )
    assert (
        code == 0 and "– training runtime torch-distributed: does not exist; only multi-node training" in out
    )
    submit = ["submit", "demo", "--cluster", "several-nodes", "--corpus", "s3://b/c", "--training.nodes", "2"]
    with serving(KubernetesHandler, pods={}, objects={}, forbidden=False) as kubernetes:
        kubernetes_at(kubernetes)
        code, _, err = program(*submit)
    assert code == 2 and err.startswith(
        "The recipe trains on several nodes, but the cluster has no training runtime torch-distributed"
    )
    assert not kubeflow.pipelines and not kubeflow.runs
    with serving(KubernetesHandler, pods={}, objects=objects(), forbidden=False) as kubernetes:
        kubernetes_at(kubernetes)
        assert program(*submit)[0] == 0
    assert len(kubeflow.runs) == 1


def test_missing_bucket_and_login_page_are_problems(doctor, kubeflow):
    kubeflow.faults = ["html"]
    code, out = doctor(profile=PROFILE.replace("s3://bucket/store", "s3://no-such-bucket/store"))
    assert code == 1
    assert "✗ Kubeflow Pipelines: " in out and "answers with a web page, most likely a login page" in out
    assert "✗ store s3://no-such-bucket/store: " in out


def test_several_nodes_need_the_rights_that_the_trainer_component_grants():
    role, *_ = yaml.safe_load_all((CHECKOUT / "manifests/components/trainer/rights.yaml").read_text())
    granted = {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    one, two = (list(_needed_rights(load_cluster("cpu"), False, nodes)) for nodes in (1, 2))
    asked = {right[:3] for right in two if right not in one}
    # The runner's own role already grants `get pods`, and a missing runtime is a finding of its own.
    assert asked == granted - {
        ("get", "", "pods"),
        ("get", "trainer.kubeflow.org", "trainingruntimes"),
    }


def test_image_of_publish_is_checked_only_for_a_profile_that_names_a_registry(doctor):
    assert "team/publish:7" not in doctor()[1]
    code, out = doctor(profile=PROFILE + "registry: {{secret: token}}\n")
    assert code == 1 and "publish:7: does not exist" in out
