"""Shards of a remote store are fetched before they are read, and released when no reader expects them."""

import threading

import torch

from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.storage import walk
from tests.artifacts.feature_store.test_store import publish, some_features
from tests.utterances import with_audio


def test_expected_shards_are_fetched_and_others_released(bucket):
    shards = [some_features(seed=i) for i in range(6)]
    size = 0
    for i, features in enumerate(shards):
        _, index = publish("s3://bucket/f", features, f"p{i}-1-of-1")
        size = max(size, index.shards[0].bytes)
    reader = FeatureStore("s3://bucket/f", cache_bytes=2 * size + 10)
    for number in range(6):
        reader.expect([number, number + 1] if number < 5 else [number])
        in_shard = [
            a for features in shards for a in features if reader.index.entry(reader.find(a)).shard == number
        ]
        assert in_shard and all(
            torch.equal(reader.read(with_audio(a)), t)
            for features in shards
            for a, t in features.items()
            if a in in_shard
        )
        cached = sum(f.bytes for f in walk(str(reader._cache.folder)) if "/" not in f.name)
        assert cached <= 2 * size + 10


def test_fetches_that_have_not_started_are_cancelled_when_their_shards_are_released(bucket, monkeypatch):
    for i in range(6):
        publish("s3://bucket/f", some_features(seed=i), f"p{i}-1-of-1")
    store = FeatureStore("s3://bucket/f")
    started, allowed, fetch = [], threading.Event(), store._fetch

    def fetch_when_allowed(number):
        started.append(number)
        assert allowed.wait(30)
        return fetch(number)

    monkeypatch.setattr(store, "_fetch", fetch_when_allowed)
    store.expect(range(6))
    store.expect([])
    allowed.set()
    store._pool.shutdown()
    assert set(started) <= {0, 1, 2}, "only three shards are fetched at once"
