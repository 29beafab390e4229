"""The server's manifests are valid and restricted, and KServe runs the same container as the Deployment."""

from dataclasses import fields

import kubernetes_validate
import pytest
import yaml

from slam_asr.cli import COMMANDS
from slam_asr.serving.limits import Limits
from tests.manifests.test_manifests import KUBERNETES, MANIFESTS, of_kind, render, values_of

OF_KSERVE = {"minReplicas", "maxReplicas", "timeout"}
"""Fields of a predictor that a pod does not have."""


@pytest.fixture(scope="module", params=["deployment", "kserve"])
def rendered(request):
    return render(MANIFESTS / "serve" / request.param)


def pod_of(objects):
    """Return the pod's specification from a Deployment or an InferenceService."""
    [item] = of_kind(objects, "Deployment", "InferenceService")
    if item["kind"] == "Deployment":
        return item["spec"]["template"]["spec"]
    predictor = item["spec"]["predictor"]
    assert item["apiVersion"] == "serving.kserve.io/v1beta1" and predictor.keys() >= OF_KSERVE
    return {name: value for name, value in predictor.items() if name not in OF_KSERVE}


def test_every_object_is_valid(rendered):
    for item in rendered:
        if item["kind"] != "InferenceService":
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] == "slam-asr-serve"
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod_of(rendered)}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_every_referenced_object_exists_or_is_the_secret_that_the_docs_create(rendered):
    claims = {claim["metadata"]["name"] for claim in of_kind(rendered, "PersistentVolumeClaim")}
    assert set(values_of(rendered, "claimName")) == claims
    assert set(values_of(rendered, "secretName")) == {"slam-asr-serve-keys"}
    guide = (MANIFESTS.parent / "docs/how-to/serving.md").read_text()
    assert "create secret generic slam-asr-serve-keys" in guide and "--from-file=keys=" in guide
    for service in of_kind(rendered, "Service"):
        [deployment] = of_kind(rendered, "Deployment")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()


def test_the_pod_is_restricted_and_starts_the_server_with_keys(rendered):
    pod = pod_of(rendered)
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    program, command, *options = container["command"]
    assert program == "slam-asr" and command in COMMANDS
    assert options[:2] == ["--host", "0.0.0.0"] and options[2] == "--api-key-file"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert options[3] == f"{mounts['keys']}/keys" and mounts["uploads"] == "/tmp"
    [port] = {probe["port"] for probe in values_of(rendered, "httpGet")}
    assert port == container["ports"][0]["containerPort"] == 8000


def test_there_is_time_and_space_for_the_requests_in_progress(rendered):
    limits = {field.name: field.default for field in fields(Limits)}
    pod = pod_of(rendered)
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= limits["deadline"] + pause
    [size] = values_of(pod["volumes"], "sizeLimit")
    assert int(size.removesuffix("Gi")) * 1024**3 >= limits["requests"] * limits["megabytes"] * 1e6
    for item in of_kind(rendered, "InferenceService"):
        assert item["spec"]["predictor"]["timeout"] >= limits["deadline"]


def test_kserve_runs_the_container_of_the_deployment():
    first, second = (pod_of(render(MANIFESTS / "serve" / name)) for name in ("deployment", "kserve"))
    for pod in (first, second):
        del pod["containers"][0]["name"], pod["containers"][0]["ports"]
    assert yaml.safe_dump(first) == yaml.safe_dump(second)
