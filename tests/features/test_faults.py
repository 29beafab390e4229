"""When a fifth of all requests fail, extraction still writes, and training reads, the same features."""

import os
import subprocess

import pytest
import torch

from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import read_manifest
from slam_asr.errors import StorageError, UserError
from slam_asr.features import encode
from slam_asr.features.maintenance import verify_store
from slam_asr.stages.extract_features import extract_features
from slam_asr.storage import walk
from slam_asr.storage.cache import DiskCache
from tests.artifacts.feature_store.test_store import publish, some_features
from tests.faults import BUSY
from tests.features.test_extract import SMALL, contents, recipe


def all_features(store, manifest) -> dict[str, torch.Tensor]:
    """Read the features of every utterance, by key, in windows of two shards as in training."""
    shards = {}
    for utterance in read_manifest(manifest):
        shards.setdefault(store.index.entry(store.find(utterance.audio_id)).shard, []).append(utterance)
    read = {}
    for number in sorted(shards):
        store.expect([number, number + 1] if number + 1 in shards else [number])
        read |= {u.key: store.read(u).clone() for u in shards[number]}
    return read


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_extraction_and_reading_survive_faults(tiny_models, many, tmp_path, faulty_s3):
    options = recipe(tiny_models, **SMALL)
    local = extract_features(options, [str(many)], str(tmp_path / "undisturbed"))
    record = extract_features(options, [str(many)], "s3://bucket/store")
    expected = all_features(FeatureStore(local.folder), many)
    for _ in range(2):
        assert same(all_features(FeatureStore(record.folder), many), expected)
    assert faulty_s3.faults.total() >= 5, faulty_s3.faults
    faulty_s3.fault_rate = 0
    assert contents("s3://bucket/store") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_an_unreachable_endpoint_ends_extraction_with_a_message_and_loses_nothing(
    tiny_models, many, tmp_path, faulty_s3, monkeypatch
):
    options, published = recipe(tiny_models, **SMALL), []

    def breaking(self, shard, features, spans, real=encode.ShardWriter._publish):
        if len(published) == 2:
            monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1")
            faulty_s3.fault_rate, faulty_s3.kinds = 1.0, ("reset",)
        published.append(shard.number)
        real(self, shard, features, spans)

    with monkeypatch.context() as patch:
        patch.setattr(encode.ShardWriter, "_publish", breaking)
        with pytest.raises(UserError, match=r"could not be (written|read) within [\d.]+ s of trying"):
            extract_features(options, [str(many)], "s3://bucket/store")
    faulty_s3.fault_rate = 0
    record = extract_features(options, [str(many)], "s3://bucket/store")
    assert record.metrics["new utterances"] == 30, "two of five shards were finished"
    extract_features(options, [str(many)], str(tmp_path / "undisturbed"))
    assert contents("s3://bucket/store") == contents(tmp_path / "undisturbed")


def test_a_failing_network_is_not_mistaken_for_damage(faulty_s3, monkeypatch):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1")
    faulty_s3.fault_rate = 0
    namespace, index = publish("s3://bucket/f", some_features())
    faulty_s3.rule = lambda request: (
        BUSY if request.method == "GET" and "/shards/" in request.target else None
    )
    with pytest.raises(StorageError):
        verify_store("s3://bucket/f", repair=True)
    assert namespace.shard_sizes() == {shard.name: shard.bytes for shard in index.shards}


@pytest.mark.slow
def test_features_are_read_correctly_if_the_local_disk_is_full(tiny_models, many, tmp_path, bucket):
    options = recipe(tiny_models, **SMALL)
    record = extract_features(options, [str(many)], "s3://bucket/store")
    local = extract_features(options, [str(many)], str(tmp_path / "undisturbed"))
    disk = tmp_path / "small disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, to mount a small disk and fill it")
    try:
        store = FeatureStore(record.folder)
        store._cache = DiskCache(disk, 10**9)
        assert same(all_features(store, many), all_features(FeatureStore(local.folder), many))
        shards = sum(f.bytes for f in walk("s3://bucket/store") if "/shards/" in f.name)
        assert 0 < sum(f.bytes for f in walk(str(disk))) < shards, "some shards fit on the disk, but not all"
        store.expect([])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
