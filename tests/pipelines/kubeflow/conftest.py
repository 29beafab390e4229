"""Fixtures for the fake servers, and for the environment that points to them."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml

from pipelines import cli
from tests.pipelines.kubeflow.fake import TOKEN, FakeKubeflow, Handler
from tests.pipelines.kubeflow.fake_kubernetes import KubernetesHandler, serving

RECORDINGS = Path(__file__).resolve().parents[4] / "shared" / "recordings"


@pytest.fixture
def kubeflow(monkeypatch, tmp_path):
    fake = FakeKubeflow()
    with serving(Handler, fake=fake) as address:
        for name in ("SLAM_ASR_IMAGES", "KF_PIPELINES_UI_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", address)
        monkeypatch.setenv("KFP_EXISTING_TOKEN", TOKEN)
        monkeypatch.setenv("SLAM_ASR_KFP_PATIENCE", "3")
        # kfp saves its context in the home folder.
        monkeypatch.setenv("HOME", str(tmp_path))
        fake.address = address
        yield fake


@pytest.fixture
def program(capsys):
    """Run a command; return its exit code, its output, and its errors without their prefix."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as exit_error:
            code = exit_error.code
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return code, out, err.removeprefix("slam-asr: error: ")

    return run


@pytest.fixture
def kubernetes_at(monkeypatch, tmp_path):
    """Write a kubeconfig that points to an address."""

    def write(address: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": address}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
            "users": [{"name": "me", "user": {"token": "another-token"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
        )

    return write


@pytest.fixture
def recording(kubeflow, kubernetes_at):
    """Serve a recorded run, and return its id. Kubernetes does not answer."""
    kubernetes_at("http://127.0.0.1:9")

    def serve(name: str) -> str:
        v2, v1 = (
            json.loads((RECORDINGS / f"run-{name}.{api}.json").read_text()) for api in ("v2beta1", "v1beta1")
        )
        kubeflow.multi_user = False
        kubeflow.recorded[v2["run_id"]] = (v2, v1)
        return v2["run_id"]

    return serve


@pytest.fixture
def cluster(kubernetes_at):
    """Serve a Kubernetes API with the pods of run-1 and one pod of run-2; return what describes each pod."""
    label = {"pipeline/runid": "run-1"}
    pods = {
        "a-train": (label | {"app.kubernetes.io/component": "train"}, "Running", "step 1\nlöss 2"),
        "a-driver": (label, "Succeeded", "not for people"),
        "a-score": (
            label | {"app.kubernetes.io/component": "score"},
            "Pending",
            "0/3 nodes are available: 3 Insufficient memory.",
        ),
        "other": (
            {"pipeline/runid": "run-2", "app.kubernetes.io/component": "train"},
            "Running",
            "of another run",
        ),
    }
    with serving(KubernetesHandler, pods=pods, objects={}, forbidden=False) as address:
        kubernetes_at(address)
        yield pods


@pytest.fixture
def fake_pods(kubernetes_at):
    """Serve these pods, as Kubernetes describes them."""
    with contextlib.ExitStack() as stack:

        def serve(*pods: dict) -> None:
            content = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": list(pods)}
            path = "/api/v1/namespaces/kubeflow/pods"
            address = stack.enter_context(
                serving(KubernetesHandler, pods={}, objects={path: (200, content)}, forbidden=False)
            )
            kubernetes_at(address)

        yield serve
