"""The feature store: found by audio, complete or not there, and never another encoder's."""

import json

import pytest
import torch

from slam_asr.errors import UserError
from slam_asr.features.store import Entry, FeatureStore, Index, plan_shards, write_index, write_shard
from slam_asr.storage import sha256_of_file

MADE_BY = {"weights_sha256": "abc", "frames": "speech", "dtype": "fp32"}


@pytest.fixture
def store(tmp_path):
    tensors = {f"address{i}": torch.randn(i + 5, 4) for i in range(3)}
    path = tmp_path / "shards" / "one.safetensors"
    write_shard(path, tensors)
    index = Index(MADE_BY, 4, {"one.safetensors": {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}})
    index.entries = {a: Entry("one.safetensors", len(t), len(t) + 1) for a, t in tensors.items()}
    write_index(tmp_path, index)
    return tmp_path, tensors


def test_what_is_written_is_read(store):
    folder, tensors = store
    reader = FeatureStore(folder, MADE_BY)
    for address, tensor in tensors.items():
        assert torch.equal(reader.read(address), tensor)
        assert reader.span(address) == len(tensor) + 1
    reader.verify()


def test_another_encoders_features_are_refused_by_what_differs(store):
    with pytest.raises(UserError, match=r"weights_sha256: store abc, model xyz"):
        FeatureStore(store[0], MADE_BY | {"weights_sha256": "xyz"})


def test_a_store_without_index_does_not_exist(store):
    (store[0] / "index.json").unlink()
    with pytest.raises(UserError, match="holds no feature store"):
        FeatureStore(store[0])


@pytest.mark.parametrize("content", ["", "[]", '{"entries": {"a": {}}}'])
def test_what_is_no_index_is_refused(store, content):
    (store[0] / "index.json").write_text(content)
    with pytest.raises(UserError, match="not a feature store's index"):
        FeatureStore(store[0])


def test_a_missing_or_cut_shard_is_seen_at_once(store):
    shard = store[0] / "shards" / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing or cut short"):
        FeatureStore(store[0])


def test_a_flipped_byte_is_found(store):
    shard = store[0] / "shards" / "one.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="checksum differs"):
        FeatureStore(store[0]).verify()


def test_audio_that_was_never_extracted_is_named(store):
    with pytest.raises(UserError, match="lacks audio nowhere"):
        FeatureStore(store[0]).read("nowhere")


def test_shards_keep_to_their_limit_and_are_named_by_content():
    sizes = {f"a{i}": 30 for i in range(10)} | {"giant": 500}
    shards = plan_shards(sizes, 100, MADE_BY)
    assert [a for s in shards for a in s.addresses] == list(sizes)
    assert all(sum(sizes[a] for a in s.addresses) <= 100 or len(s.addresses) == 1 for s in shards)
    assert [s.name for s in shards] == [s.name for s in plan_shards(sizes, 100, MADE_BY)]
    assert {s.name for s in shards}.isdisjoint(s.name for s in plan_shards(sizes, 100, MADE_BY | {"dtype": "bf16"}))


def test_the_index_is_json_that_anyone_can_read(store):
    index = json.loads((store[0] / "index.json").read_text())
    assert index["fingerprint"] == MADE_BY and index["entries"]["address0"]["frames"] == 5
