"""A store can be listed, verified, repaired and pruned, and what remains can still be read."""

import pytest
import torch

from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import read_manifest
from slam_asr.cli import run
from slam_asr.errors import UserError
from slam_asr.features.maintenance import verify_store
from slam_asr.stages.extract_features import extract_features
from slam_asr.storage import delete, exists, join, read_bytes, walk, write_bytes
from tests.artifacts.feature_store.test_store import publish
from tests.features.conftest import utterances_in
from tests.features.test_extract import SMALL, contents, recipe
from tests.utterances import write_manifest


@pytest.fixture(params=["folder", "prefix"])
def store_of_three(request, tiny_models, tmp_path):
    """Return a store's path, a manifest, and a function that fills the store: three shards of ten each."""
    if request.param == "prefix":
        request.getfixturevalue("bucket")
        store = "s3://bucket/features"
    else:
        store = str(tmp_path / "features")
    write_manifest(tmp_path / "m.jsonl", utterances_in(tmp_path, [0.2 + 0.01 * i for i in range(30)]))
    options = recipe(tiny_models, **SMALL)
    return (
        store,
        str(tmp_path / "m.jsonl"),
        lambda: extract_features(options, [str(tmp_path / "m.jsonl")], store),
    )


def test_a_store_is_listed(store_of_three, capsys):
    store, _, extract = store_of_three
    extract()
    run("features", ["ls", store])
    printed = capsys.readouterr().out
    assert "30 utterances" in printed and "in 3 shards" in printed
    assert "nothing refers to" not in printed


@pytest.mark.parametrize("damage", ["flipped", "deleted", "cut"])
def test_damaged_shards_are_found_removed_and_computed_again(store_of_three, damage):
    store, _, extract = store_of_three
    extract()
    before = contents(store)
    run("features", ["verify", store])
    shard = join(store, sorted(n for n in before if "/shards/" in n)[1])
    content = bytearray(read_bytes(shard))
    content[len(content) // 2] ^= 1
    delete(shard)
    if damage != "deleted":
        write_bytes(shard, bytes(content) if damage == "flipped" else bytes(content[:-5]))
    with pytest.raises(
        UserError, match="1 damaged shard, and 0" if damage == "flipped" else "0 damaged shards, and 1"
    ):
        run("features", ["verify", store])
    with pytest.raises(UserError, match="extract-features"):
        run("features", ["verify", store, "--repair", "true"])
    extract()
    assert contents(store) == before
    run("features", ["verify", store])


@pytest.mark.parametrize("rows", [5, 20_000], ids=["read at once", "read in ranges"])
def test_an_object_that_differs_from_its_own_checksum_is_a_damaged_shard(bucket, capsys, rows):
    features = {"a" * 64: torch.zeros(rows, 128)}
    namespace, index = publish("s3://bucket/f", features)
    path = namespace.shard_path(index.shards[0].name)
    key = path.removeprefix("s3://bucket/")
    written = bucket.Object(key).get()
    content = bytearray(written["Body"].read())
    content[-1] ^= 1
    bucket.put_object(Key=key, Body=bytes(content), Metadata=written["Metadata"])
    with pytest.raises(UserError, match=r"after `slam-asr features verify s3://bucket/f --repair true`"):
        verify_store("s3://bucket/f")
    assert f"{path}: damaged" in capsys.readouterr().out and exists(path)
    with pytest.raises(UserError, match="extract-features"):
        verify_store("s3://bucket/f", repair=True)
    assert not exists(path)


def test_pruning_retains_the_shards_that_a_manifest_needs(store_of_three, tmp_path):
    store, manifest, extract = store_of_three
    record = extract()
    reader = FeatureStore(record.folder)
    of_shard = {}
    for utterance in read_manifest(manifest):
        of_shard.setdefault(reader.index.entry(reader.find(utterance.audio_id)).shard, []).append(utterance)
    few = of_shard[0][:2]
    features = {u.key: reader.read(u).clone() for u in few}
    write_manifest(tmp_path / "few.jsonl", few)
    before = contents(store)
    run("features", ["prune", store, "--keep", f"[{tmp_path / 'few.jsonl'}]"])
    assert contents(store) == before, "without --yes nothing is removed"
    run("features", ["prune", store, "--keep", f"[{tmp_path / 'few.jsonl'}]", "--yes", "true"])
    after = FeatureStore(store)
    assert sum("/shards/" in f.name for f in walk(store)) == 1 and len(after.index) == len(of_shard[0])
    assert all(torch.equal(after.read(u), features[u.key]) for u in few)
    run("features", ["verify", store])
    assert extract().metrics["new utterances"] == 20
    assert len(FeatureStore(store).index) == 30


def test_unreferenced_shards_and_a_namespace_with_all_its_shards_are_removed(store_of_three):
    store, _, extract = store_of_three
    extract()
    before = contents(store)
    namespace = next(iter(before)).partition("/")[0]
    write_bytes(join(store, namespace, "shards", "f" * 64 + ".safetensors"), b"unreferenced")
    run("features", ["prune", store, "--yes", "true"])
    assert contents(store) == before
    with pytest.raises(UserError, match="has no nonsense"):
        run("features", ["prune", store, "--drop", "[nonsense]"])
    run("features", ["prune", store, "--drop", f"[{namespace}]", "--yes", "true"])
    assert contents(store) == {}


@pytest.mark.parametrize("arguments", [[], ["frobnicate"]])
def test_an_unknown_command_lists_those_that_exist(arguments):
    with pytest.raises(UserError, match="needs one of ls, verify, prune"):
        run("features", arguments)


def test_a_missing_store_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no feature store"):
        run("features", ["ls", str(tmp_path)])
