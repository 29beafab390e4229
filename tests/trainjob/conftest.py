"""A cluster with Kubeflow Trainer, whose API is that of a small local server."""

import http.server
import threading

import pytest
import yaml

from slam_asr.artifacts.stage_record import Outcome, run_stage, write_pointer
from slam_asr.trainjob import follow
from tests.trainjob.jobs import STORE
from tests.trainjob.kubernetes_api import FakeCluster, RequestHandler


@pytest.fixture
def kubernetes(monkeypatch, tmp_path):
    """The state of a cluster with Kubeflow Trainer; the default kubeconfig names its server."""
    fake = FakeCluster()
    for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RequestHandler) as server:
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
    """The same cluster with a bucket. A complete job has written its record and its pointer."""

    def finish(name: str) -> None:
        record = run_stage(
            "train", f"{STORE}/train/{name}", {"job": name}, lambda folder: Outcome("2 steps", {"steps": 2})
        )
        write_pointer(record, f"{STORE}/train/jobs/{name}.json")

    kubernetes.when_complete = finish
    return kubernetes
