"""doctor finds what is missing, explains what to do, and shows no secret."""

import base64
from pathlib import Path

import pytest
import yaml

from pipelines.kubeflow.namespace import run_rights, training_rights
from tests.pipelines.kubeflow.fake_kubernetes import KubernetesHandler, RegistryHandler, serving

CHECKOUT = Path(__file__).resolve().parents[3]
PROFILE = """
namespace: team
service_account: runner
images: {{names: "{registry}/team/{{stage}}:7", pull_secrets: [login]}}
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
        f"{NAMESPACE}/secrets/login": (
            200,
            {"metadata": {"name": "login"}, "type": "kubernetes.io/dockerconfigjson", "data": {}},
        ),
        f"{NAMESPACE}/secrets/mlpipeline-minio-artifact": (200, {"metadata": {}, "data": encoded}),
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
                    "artifactRepository": "archiveLogs: true\ns3:\n  bucket: mlpipeline\n"
                    "  secretKeySecret: {name: mlpipeline-minio-artifact, key: secretkey}\n",
                    "workflowDefaults": "spec:\n  templateDefaults:\n    retryStrategy:\n      limit: '2'\n"
                    "      retryPolicy: OnError\n",
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
    assert len(lines) == 22 and all(line.startswith("✓ ") for line in lines[:-1]), out
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
        (
            without(f"{NAMESPACE}/serviceaccounts/runner"),
            "✗ service account runner: does not exist in team: `kubectl -n team create serviceaccount "
            "runner` creates it.",
        ),
        (
            without(f"{NAMESPACE}/secrets/bucket-secret"),
            "✗ secret bucket-secret: does not exist in team: `kubectl -n team create secret generic "
            "bucket-secret --from-literal=accesskey=… --from-literal=secretkey=…` creates it.",
        ),
        (
            changed(f"{NAMESPACE}/secrets/bucket-secret", data={"key": ""}),
            "✗ secret bucket-secret: contains key, but must contain accesskey and secretkey, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: add what is missing with `kubectl -n team edit ",
        ),
        (
            changed(f"{NAMESPACE}/secrets/hub", data={}),
            "✗ secret hub: contains nothing, but must contain HF_TOKEN: add",
        ),
        (
            changed(f"{NAMESPACE}/secrets/hooks", data={"URL": ""}),
            "✗ secret hooks: contains URL, but must contain url: add",
        ),
        (
            without(f"{NAMESPACE}/secrets/login"),
            "✗ pull secret login: does not exist in team: `kubectl -n team create secret docker-registry "
            "login --docker-server=… --docker-username=… --docker-password=…` creates it.",
        ),
        (
            changed(f"{NAMESPACE}/secrets/login", type="Opaque"),
            "✗ pull secret login: is of type Opaque, but nodes need kubernetes.io/dockerconfigjson: delete",
        ),
        (
            lambda served, manifests: served.update(
                denied=["get secrets mlpipeline-minio-artifact", "get pods"]
            ),
            "✗ rights of runner: it is not allowed to get pods, get secrets mlpipeline-minio-artifact in "
            "team: `kubectl apply -n team -k manifests/runner` grants what runs need to slam-asr-runner, and "
            "`kubectl -n team create rolebinding runner --role=slam-asr-runner "
            "--serviceaccount=team:runner` to runner.",
        ),
        (
            changed(
                "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public",
                data={"kubeflow_trainer_version": "v2.1.0"},
            ),
            "✗ Kubeflow Trainer: is v2.1.0, but training on several nodes needs 2.2 or later: `kubectl "
            "apply --server-side -k",
        ),
        (
            without(f"{NAMESPACE}/persistentvolumeclaims/models"),
            "✗ model volume models: does not exist in team: `kubectl apply -n team -k manifests/runner`",
        ),
        (
            without("/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/research"),
            "✗ queue research: does not exist in team: add manifests/components/kueue to your overlay",
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
            "✗ image registry/team/train:7: not found in the registry: push with `make images",
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


@pytest.mark.parametrize("config_map", ["without a root", "missing"])
def test_launcher_with_kubeflows_own_storage_needs_its_secret(doctor, config_map):
    secret = f"{NAMESPACE}/secrets/mlpipeline-minio-artifact"
    launcher = f"{NAMESPACE}/configmaps/kfp-launcher"

    def without_root(served, manifests):
        # Kubeflow's default applies without the ConfigMap too.
        if config_map == "without a root":
            served[launcher] = (200, {"metadata": {"name": "kfp-launcher"}})
        else:
            del served[launcher]

    code, out = doctor(without_root)
    assert code == 0, out
    assert (
        "✓ launcher configuration: artifacts go to Kubeflow's own storage, with the secret mlpipeline-m"
        in out
    )
    code, out = doctor(lambda *given: (without_root(*given), given[0].pop(secret)))
    label = "`kubectl label namespace team pipelines.kubeflow.org/enabled=true` makes Kubeflow create it."
    assert code == 1, out
    assert (
        "✗ launcher configuration: artifacts go to Kubeflow's own storage with the secret mlpipeline-minio-"
        f"artifact, which does not exist in team: {label}" in out
    )
    # Argo archives logs with the same secret.
    assert (
        "✗ log archive: Argo mounts the secret mlpipeline-minio-artifact into every pod, to archive logs, "
        f"but team has none: {label}" in out
    )


def launcher(root, **provider):
    """Set the pipeline root and, if given, the entry of `providers` for the root's kind of address."""
    providers = {root.partition("://")[0]: provider} if provider else {}
    data = {"defaultPipelineRoot": root, "providers": yaml.safe_dump(providers)}
    return changed(f"{NAMESPACE}/configmaps/kfp-launcher", data=data)


def credentials(name):
    keys = {"accessKeyKey": "accesskey", "secretKeyKey": "secretkey"}
    return {"fromEnv": False, "secretRef": {"secretName": name} | keys}


OURS = {"endpoint": "store.team.svc.cluster.local:9000", "disableSSL": True}
"""A provider on http://store.team:9000, the server in the profile of the test below, by its full name."""


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            launcher("s3://other/x", default=OURS | {"credentials": credentials("bucket-secret")}),
            "✓ launcher configuration: artifacts go to s3://other/x, with the secret bucket-secret",
        ),
        # Artifacts may be on another server, with a secret and a bucket of their own.
        (
            launcher(
                "minio://mlpipeline/x", default={"credentials": credentials("mlpipeline-minio-artifact")}
            ),
            "✓ launcher configuration: artifacts go to minio://mlpipeline/x, with the secret mlpipeline-min",
        ),
        (
            launcher("s3://bucket/x", default={"credentials": credentials("hooks")}),
            "✗ launcher configuration: artifacts go to s3://bucket/x at AWS, but the profile's "
            "storage.endpoint is http://store.team:9000: correct `providers` with `kubectl -n team edit "
            "configmap kfp-launcher`, or the profile.",
        ),
        (
            launcher(
                "s3://bucket/x",
                default=OURS | {"disableSSL": False, "credentials": credentials("bucket-secret")},
            ),
            "go to s3://bucket/x at https://store.team.svc.cluster.local:9000, but the profile's storage.en",
        ),
        (
            launcher(
                "s3://bucket/x",
                default={"credentials": {"fromEnv": True}},
                overrides=[
                    OURS | {"bucketName": "bucket", "keyPrefix": "x", "credentials": credentials("none")}
                ],
            ),
            "✗ launcher configuration: artifacts go to s3://bucket/x with the secret none, which does not "
            "exist in team: `kubectl -n team create secret generic none --from-literal=accesskey=… ",
        ),
        (
            launcher("s3://bucket/x", default=OURS | {"credentials": credentials("hooks")}),
            "✗ launcher configuration: artifacts go to s3://bucket/x with the secret hooks, which has no key "
            "accesskey and no secretkey: correct it, or the keys in `providers`.",
        ),
        (
            launcher("s3://bucket/x"),
            "– launcher configuration: artifacts go to s3://bucket/x without a secret, so the role of the ",
        ),
        (
            launcher("s3://bucket/x", default={"endpoint": "x"}),
            "✗ launcher configuration: The `providers` of kfp-launcher cannot be read (KeyError: 'creden",
        ),
    ],
)
def test_launchers_provider_must_agree_with_the_profiles_store(doctor, change, finding):
    profile = PROFILE.replace('bucket/store"', 'bucket/store", endpoint: "http://store.team:9000"')
    _, out = doctor(change, profile=profile)
    assert finding in out, out


def test_account_needs_the_right_to_read_the_secret_of_the_launchers_provider(doctor):
    provider = launcher("s3://other/x", default={"credentials": credentials("hub")})

    def denied(served, manifests):
        provider(served, manifests)
        served["denied"] = ["get secrets hub"]

    assert (
        "✗ rights of runner: it is not allowed to get secrets hub in team: `kubectl apply -n team -k "
        in doctor(denied)[1]
    )
    assert "once hub is among the resourceNames in manifests/runner/service-account.yaml" in doctor(denied)[1]


def test_secret_of_the_model_registry_needs_the_keys_of_one_registry(doctor):
    profile = PROFILE + "registry: {{secret: registry}}\n"

    def with_keys(*keys):
        def change(served, manifests):
            manifests["team/publish:7"] = 200
            served[f"{NAMESPACE}/secrets/registry"] = (200, {"metadata": {}, "data": dict.fromkeys(keys, "")})

        return change

    for keys in (
        ["MODEL_REGISTRY_TOKEN"],
        ["MLFLOW_TRACKING_TOKEN"],
        ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
    ):
        code, out = doctor(with_keys(*keys), profile=profile)
        assert code == 0 and f"✓ secret registry: exists, with {' and '.join(keys)}" in out, out
    code, out = doctor(with_keys("MLFLOW_TRACKING_USERNAME"), profile=profile)
    assert code == 1 and "✗ secret registry: contains MLFLOW_TRACKING_USERNAME, but must contain MODEL" in out
    code, out = doctor(lambda served, manifests: manifests.update({"team/publish:7": 200}), profile=profile)
    assert code == 1 and "✗ secret registry: does not exist in team: `kubectl -n team create secret ge" in out


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
    ("name", "loaded_name"), [("slam-asr/", "docker.io/slam-asr/"), ("", "docker.io/library/")]
)
def test_image_without_a_registry_must_be_loaded_into_the_nodes(doctor, name, loaded_name):
    loaded = [
        {"names": [f"{loaded_name}{stage}:7"]}
        for stage in ("build-manifest", "extract-features", "train", "convert-checkpoint")
    ]

    def load(served, manifests):
        served["/api/v1/nodes"][1]["items"][0]["status"]["images"] = loaded

    code, out = doctor(load, profile=PROFILE.replace("{registry}/team/", name))
    # One line for all images with the same result.
    assert code == 1 and "✓ 4 images: loaded into the nodes\n" in out, out
    assert f"✗ image {name}decode:7: cannot be found by the nodes, except on Docker Hub" in out
    assert "load with `make images LOAD=kind`" in out
    code, out = doctor(load, profile=PROFILE.replace("{registry}/team/", name), forbidden=True)
    assert code == 0 and f"– images {name}build-manifest:7, {name}extract-features:7, {name}train:7" in out


def test_kubeflow_without_trainer_and_in_another_namespace_has_no_problem(doctor):
    def remove(served, manifests):
        for path in [path for path in served if "trainer" in path or "workflow-controller" in path]:
            del served[path]

    code, out = doctor(remove)
    assert code == 0, out
    assert (
        "– Kubeflow Trainer: is not installed; only multi-node training needs it, in version 2.2 or later: `k"
        in out
    )
    assert "– training runtime torch-distributed: does not exist; only multi-node training" in out
    assert "for TrainJobs" not in out
    assert "– retries: kubeflow has no workflow-controller-configmap of Argo: write the namespace of " in out


def test_what_cannot_be_read_is_unknown(doctor):
    code, out = doctor(forbidden=True)
    assert code == 0 and out.count("you are not allowed to read it (403)") == 15, out
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


@pytest.mark.parametrize(
    ("schema", "finding"),
    [
        ({"properties": {"runtimePatches": {}}}, "✓ Kubeflow Trainer: is 2.2 or later, by its schema"),
        (
            {"properties": {"podTemplateOverrides": {}}},
            "✗ Kubeflow Trainer: is older than 2.2, by its schema",
        ),
    ],
)
@pytest.mark.parametrize("status", [403, 404])
def test_trainer_without_a_readable_version_is_recognised_by_its_schema(doctor, status, schema, finding):
    def change(served, manifests):
        served["/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public"] = (status, {})
        served["/openapi/v3/apis/trainer.kubeflow.org/v1alpha1"] = (200, schema)

    assert finding in doctor(change)[1]


def test_runtime_in_the_namespace_of_the_runs_comes_first(doctor):
    group = "/apis/trainer.kubeflow.org/v1alpha1"

    def move(served, manifests):
        runtime = served.pop(f"{group}/clustertrainingruntimes/torch-distributed")
        served[f"{group}/namespaces/team/trainingruntimes/torch-distributed"] = runtime

    code, out = doctor(move)
    assert code == 0 and "✓ training runtime torch-distributed: exists" in out, out


def test_missing_rights_for_trainjobs_are_a_problem_only_for_several_nodes(doctor):
    served = {}

    def deny(objects, manifests):
        objects["denied"] = ["get trainingruntimes torch-distributed", "patch trainjobs"]
        served.update(reviews=objects.setdefault("reviews", []))

    code, out = doctor(deny)
    assert code == 0, out
    assert (
        "– rights of runner for TrainJobs: it is not allowed to get trainingruntimes torch-distributed, "
        "patch trainjobs in team, which only multi-node training needs: add manifests/components/trainer to "
        "your overlay, and apply it with `kubectl apply -k`." in out
    )
    account = "system:serviceaccount:team:runner"
    # This kind of object is in no namespace.
    assert (account, None, "get clustertrainingruntimes torch-distributed") in served["reviews"]
    assert (account, "team", "get trainingruntimes torch-distributed") in served["reviews"]


def granted(path: str, kinds: str) -> set[tuple[str, str, str]]:
    """The verbs, API groups and resources of the roles of these kinds in a manifest."""
    objects = yaml.safe_load_all((CHECKOUT / path).read_text())
    return {
        (verb, group, resource)
        for role in objects
        if role["kind"] in kinds.split()
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_doctor_asks_for_the_rights_that_the_manifests_grant():
    asked = {right[:3] for right in training_rights("torch-distributed")}
    assert asked == granted("manifests/components/trainer/rights.yaml", "Role ClusterRole")
    asked = {right[:3] for right in run_rights("slam-asr-s3")}
    assert asked == granted("manifests/runner/service-account.yaml", "Role")


def test_image_of_publish_is_checked_only_for_a_profile_that_names_a_registry(doctor):
    assert "team/publish:7" not in doctor()[1]
    code, out = doctor(profile=PROFILE + "registry: {{secret: token}}\n")
    assert code == 1 and "publish:7: not found in the registry" in out
