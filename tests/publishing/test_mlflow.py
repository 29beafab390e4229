"""MLflow's registry behaves as Kubeflow's: one version per model, with which the next model is compared."""

import pytest

from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.publishing.connection import open_registry
from slam_asr.publishing.registry import Version
from slam_asr.stages.publish import check_registry, publish

mlflow = pytest.importorskip(
    "mlflow", reason="needs mlflow-skinny (the optional extra `trackers`, which is not in the lock file)"
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A client of a registry in a local folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return mlflow.MlflowClient(f"file:{tmp_path}/mlruns")


@pytest.mark.slow
def test_a_model_becomes_one_version_and_a_better_model_the_next(store, trained, recipe_with, tmp_path):
    def published(name, wrong, output):
        recipe = recipe_with(publish__registry="mlflow", gate__better_than="registered")
        return publish(recipe, *trained(name, wrong), str(tmp_path / output), run="run-7").summary

    assert published("first", 3, "1").startswith("published as version 1 of demo: WER 16.67 %")
    assert published("first", 3, "again").startswith("published as version 1 of demo: WER 16.67 %")
    assert "not significantly better than 16.67 % of the registered version 1" in published("bad", 1, "2")
    assert published("better", 30, "3").startswith("published as version 2 of demo: WER 1.67 %, and 1.67 %")
    first, second = sorted(store.search_model_versions("name='demo'"), key=lambda v: int(v.version))
    assert second.source == str(tmp_path / "better" / "model")
    assert second.tags["scores"] == str(tmp_path / "better" / "scores")
    assert (first.tags["wer"], first.tags["run"], first.tags["train_manifest_sha256"]) == (
        "16.67",
        "run-7",
        "a1",
    )


def test_newest_of_many_versions_is_the_one_with_the_highest_number(store):
    registry = open_registry("mlflow", "many")
    assert registry.newest() is None
    for number in range(11):
        registry.register(f"f{number}", "s3://b/m", "", {"fingerprint": f"f{number}", "scores": f"s{number}"})
    assert registry.newest() == Version("11", "s10")
    assert registry.find("f3") == Version("4", "s3")


def test_faults_are_one_sentence(recipe_with, tmp_path, monkeypatch):
    recipe = recipe_with(publish__registry="mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigurationError, match=r"neither MLFLOW_REGISTRY_URI nor MLFLOW_TRACKING_URI is set"
    ):
        check_registry(recipe, str(tmp_path / "out"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:a-password@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ClusterError, match=r"does not answer .*: check MLFLOW_REGISTRY_URI") as error:
        check_registry(recipe, str(tmp_path / "out"))
    assert "\n" not in error.value.args[0] and "a-password" not in str(error.value)
