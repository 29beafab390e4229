"""A second machine reuses all results of a run from object storage, and nothing reveals credentials."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slam_asr.storage import read_bytes, walk

CHECKOUT = Path(__file__).resolve().parents[2]
SECRETS = ("a-secret-that-nobody-may-see", "AKIAKEYTHATISSECRETTOO")


@pytest.mark.slow
def test_second_machine_reuses_all_results_in_the_bucket(
    bucket, tiny_recipe, tiny_corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[1])
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "run",
        str(tiny_recipe),
        "--corpus",
        str(tiny_corpus),
        "--store",
        "s3://bucket/runs/tiny",
        "--features.parts",
        "2",
        "--features.shard_megabytes",
        "1",
    ]
    # The second run simulates another machine: only the bucket is shared.
    for run in ("first", "second"):
        monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / f"cache-{run}"))
        done = subprocess.run(
            [*command, "--output", str(tmp_path / run)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if run == "second":
            assert done.stdout.count("(cached)") == 7, done.stdout
        for text in (done.stdout, done.stderr, (tmp_path / run / "kfp.log").read_text()):
            assert not any(secret in text for secret in SECRETS)
    names = [f.name for f in walk("s3://bucket/runs/tiny")]
    for expected in (
        "train.jsonl",
        "projector.safetensors",
        "report.html",
        "curves.html",
        "hypotheses.jsonl",
    ):
        assert any(name.endswith(expected) for name in names), expected
    assert sum(name.startswith("features/") and "/indexes/" in name for name in names) == 6, (
        "three manifests, each in two work shards"
    )
    for folder in [tmp_path / "first", "s3://bucket/runs/tiny"]:
        for file in walk(str(folder)):
            content = read_bytes(f"{folder}/{file.name}")
            assert not any(secret.encode() in content for secret in SECRETS), file.name
    [report] = [name for name in names if name.startswith("score/") and name.endswith("stage.json")]
    assert json.loads(read_bytes(f"s3://bucket/runs/tiny/{report}"))["metrics"]["wer"] >= 0


@pytest.mark.slow
def test_compiled_pipeline_contains_no_credentials(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[1])
    subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(tmp_path)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "slam-asr.yaml").is_file()
    for file in tmp_path.rglob("*.yaml"):
        assert not any(secret in file.read_text() for secret in SECRETS)
