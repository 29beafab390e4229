"""Features are addressed by audio, and never read if incomplete, damaged or of another encoder."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slam_asr.artifacts.feature_store.index import Index, isin_sorted, merge, to_array
from slam_asr.artifacts.feature_store.namespace import FeatureNamespace, pack
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance
from slam_asr.errors import UserError
from slam_asr.models.feature_dtype import QuantizedFrames, dequantize, quantize, round_trip
from slam_asr.storage import delete, read_bytes, walk, write_bytes
from tests.utterances import with_audio

FINGERPRINT = {"weights_sha256": "abc", "frames": "speech", "dtype": "fp32"}


def audio_id_of(name) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def publish(root, features, name="plan-1-of-1", fingerprint=FINGERPRINT) -> tuple[FeatureNamespace, Index]:
    """Write features by audio id into a store, as one shard and its index."""
    namespace = FeatureNamespace.of(str(root), fingerprint)
    content, index = pack(
        {a: quantize(t, fingerprint["dtype"]) for a, t in features.items()},
        fingerprint,
        {a: len(t) + 1 for a, t in features.items()},
    )
    namespace.write_fingerprint(fingerprint, index.width)
    write_bytes(namespace.shard_path(index.shards[0].name), content)
    write_bytes(namespace.index_path(name), index.to_bytes())
    return namespace, index


def some_features(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {audio_id_of((seed, i)): torch.randn(i + 5, 4, generator=generator) for i in range(count)}


@pytest.fixture(params=["folder", "prefix"])
def root(request, tmp_path):
    if request.param == "prefix":
        request.getfixturevalue("bucket")
        return "s3://bucket/features"
    return str(tmp_path / "features")


def test_written_features_can_be_read(root):
    features = some_features()
    publish(root, features)
    reader = FeatureStore(root, {"weights_sha256": "abc"})
    for a, tensor in features.items():
        utterance = with_audio(a)
        assert torch.equal(reader.read(utterance), tensor) and torch.equal(reader.read(utterance), tensor)
        assert reader.span(utterance) == len(tensor) + 1
        assert reader.index.entry(reader.find(a)).frames == len(tensor)


def test_shards_are_safetensors_that_anyone_can_read(tmp_path):
    features = some_features()
    namespace, index = publish(tmp_path, features)
    loaded = load_file(namespace.shard_path(index.shards[0].name))
    assert loaded.keys() == features.keys() and all(torch.equal(loaded[a], t) for a, t in features.items())
    assert (
        hashlib.sha256(read_bytes(namespace.shard_path(index.shards[0].name))).hexdigest()
        == index.shards[0].sha256
    )


def test_several_indexes_are_merged_and_old_files_are_unchanged(root):
    first, second = some_features(seed=1), some_features(seed=2)
    publish(root, first, "a-1-of-1")
    before = {f.name: read_bytes(f"{root}/{f.name}") for f in walk(root)}
    publish(root, second, "b-1-of-1")
    after = {f.name: read_bytes(f"{root}/{f.name}") for f in walk(root)}
    assert before.items() <= after.items()
    reader = FeatureStore(root)
    assert all(torch.equal(reader.read(with_audio(a)), t) for a, t in (first | second).items())


def test_an_audio_id_in_two_indexes_counts_once(tmp_path):
    features = some_features()
    _, one = publish(tmp_path, features, "a-1-of-1")
    both = merge(FINGERPRINT, 4, [one, one])
    assert both.to_bytes() == one.to_bytes() and both.audio_ids() == sorted(features)


def test_only_the_requested_entries_are_loaded(tmp_path):
    features = some_features(20)
    publish(tmp_path, features)
    requested = sorted(features)[3:5]
    reader = FeatureStore(str(tmp_path), audio_ids=requested)
    assert reader.index.audio_ids() == requested
    with pytest.raises(UserError, match="lacks audio"):
        reader.read(with_audio(sorted(features)[0]))


def test_an_index_finds_every_entry_and_no_other(tmp_path):
    features = {audio_id_of(i): torch.zeros(0, 4) for i in range(500)}
    _, index = publish(tmp_path, features)
    reloaded = Index.from_bytes(index.to_bytes(), "here")
    assert all(reloaded.entry(reloaded.find(a)).span == 1 for a in features)
    assert (
        reloaded.find(audio_id_of("nobody")) == -1
        and reloaded.find("0" * 64) == -1
        and reloaded.find("f" * 64) == -1
    )
    located = reloaded.locate(to_array([*sorted(features), audio_id_of("nobody")]))
    assert located.tolist() == [*range(500), -1]


def test_audio_ids_with_equal_beginnings_are_distinguished():
    similar = ["ab" * 8 + f"{i:048x}" for i in (3, 1, 2)]
    _, index = pack(
        {a: QuantizedFrames(torch.full((1, 2), float(i)), None) for i, a in enumerate(similar)},
        FINGERPRINT,
        dict.fromkeys(similar, 1),
    )
    assert [index.find(a) for a in sorted(similar)] == [0, 1, 2]
    assert index.locate(to_array(similar)).tolist() == [2, 0, 1]
    assert index.find("ab" * 8 + f"{9:048x}") == -1
    others = ["ab" * 8 + f"{i:048x}" for i in (0, 3, 9, 2)]
    assert isin_sorted(to_array(others), index.columns["address"]).tolist() == [False, True, False, True]


def test_another_encoders_features_are_refused_naming_the_difference(tmp_path):
    publish(tmp_path, some_features())
    with pytest.raises(UserError, match=r"weights_sha256: store abc, model xyz"):
        FeatureStore(str(tmp_path), {"weights_sha256": "xyz", "frames": "speech"})


def test_a_changed_encoder_has_its_own_namespace(tmp_path):
    publish(tmp_path, some_features(seed=1))
    other = FINGERPRINT | {"weights_sha256": "xyz"}
    publish(tmp_path, some_features(seed=2), fingerprint=other)
    assert FeatureStore(str(tmp_path), {"weights_sha256": "xyz"}).fingerprint == other
    with pytest.raises(UserError, match="several kinds"):
        FeatureStore(str(tmp_path))


def test_the_requested_dtype_is_read(tmp_path):
    publish(tmp_path, some_features())
    publish(tmp_path, some_features(), fingerprint=FINGERPRINT | {"dtype": "fp8"})
    assert FeatureStore(str(tmp_path), {"weights_sha256": "abc"}, "fp8").dtype == "fp8"
    assert FeatureStore(str(tmp_path), {"weights_sha256": "abc"}, "fp32").dtype == "fp32"


def test_a_store_without_an_index_does_not_exist(root):
    namespace, _ = publish(root, some_features())
    delete(namespace.index_path("plan-1-of-1"))
    with pytest.raises(UserError, match="no index"):
        FeatureStore(root)
    with pytest.raises(UserError, match="holds no feature store"):
        FeatureStore(f"{root}/nothing")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: b"",
        lambda c: c[:-1],
        lambda c: b"[]" + c,
        lambda c: c.replace(b"scale_begin", b"scale_bugin"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage):
    namespace, index = publish(tmp_path, some_features())
    write_bytes(namespace.index_path("plan-1-of-1"), damage(index.to_bytes()))
    with pytest.raises(UserError, match=r"not a feature store's index"):
        FeatureStore(str(tmp_path))


@pytest.mark.parametrize(("keep", "word"), [(None, "missing"), (-1, "cut short")])
def test_missing_shards_are_noticed_when_the_store_is_opened(root, keep, word):
    namespace, index = publish(root, some_features())
    path = namespace.shard_path(index.shards[0].name)
    content = read_bytes(path)
    delete(path)
    if keep:
        write_bytes(path, content[:keep])
    with pytest.raises(UserError, match=f"is {word}: run `slam-asr extract-features` again"):
        FeatureStore(root)


def test_a_flipped_byte_is_never_read(root):
    features = some_features()
    namespace, index = publish(root, features)
    path = namespace.shard_path(index.shards[0].name)
    content = bytearray(read_bytes(path))
    content[-1] ^= 1
    write_bytes(path, bytes(content))
    reader = FeatureStore(root)
    damaged = [a for a in features if _fails(reader, a)]
    # In a local shard, only the damaged utterance fails. A fetched shard is rejected as one file.
    assert len(damaged) == (1 if root.startswith("/") else len(features))


def _fails(reader, a):
    try:
        reader.read(with_audio(a))
    except UserError as error:
        assert "is damaged" in str(error)
        return True
    return False


def test_the_advice_for_a_damaged_shard_names_the_store_even_if_a_folder_in_it_was_opened(tmp_path):
    features = some_features()
    namespace, index = publish(tmp_path, features)
    shard = Path(namespace.shard_path(index.shards[0].name))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = FeatureStore(namespace.root)
    with pytest.raises(UserError, match=re.escape(f"`slam-asr features verify {tmp_path} --repair true`")):
        for audio_id in features:
            store.read(with_audio(audio_id))


def test_without_space_on_local_disk_utterances_are_read_one_by_one(bucket, monkeypatch):
    features = some_features()
    publish("s3://bucket/f", features)
    reader = FeatureStore("s3://bucket/f", cache_bytes=10)
    assert all(torch.equal(reader.read(with_audio(a)), t) for a, t in features.items())
    assert not [f for f in walk(str(reader._cache.folder)) if not f.name.startswith(".")]


def test_a_flipped_byte_is_noticed_even_if_no_shard_fits_on_the_local_disk(bucket):
    features = some_features()
    namespace, index = publish("s3://bucket/f", features)
    path = namespace.shard_path(index.shards[0].name)
    content = bytearray(read_bytes(path))
    content[-1] ^= 1
    bucket.put_object(Key=path.removeprefix("s3://bucket/"), Body=bytes(content))
    reader = FeatureStore("s3://bucket/f", cache_bytes=10)
    assert sum(_fails(reader, a) for a in features) == 1


def test_only_expected_shards_are_mapped(root):
    shards = [some_features(seed=i) for i in range(6)]
    for i, features in enumerate(shards):
        publish(root, features, f"p{i}-1-of-1")
    reader = FeatureStore(root)
    retained = {}
    for number in range(6):
        reader.expect([number])
        retained |= {
            a: (reader.read(with_audio(a)), t)
            for features in shards
            for a, t in features.items()
            if reader.index.entry(reader.find(a)).shard == number
        }
        assert list(reader._mapped) == [number]
    assert len(retained) == 18 and all(torch.equal(read, expected) for read, expected in retained.values()), (
        "features outlive their shard's mapping"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_features_are_read_to_the_precision_of_their_dtype(tmp_path, dtype):
    frames = (
        torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 50)[:, None]
    )
    frames[7] = 0
    publish(tmp_path, {audio_id_of(dtype): frames}, fingerprint=FINGERPRINT | {"dtype": dtype})
    read = FeatureStore(str(tmp_path)).read(with_audio(audio_id_of(dtype)))
    assert torch.equal(read, round_trip(frames, dtype)) and torch.isfinite(read.float()).all()
    # Rounding changes a value by at most half of its mantissa's last bit. In fp8, values far below the
    # frame's largest one have fewer bits, so the limit for the largest one applies to the complete frame.
    error = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 0, "fp8": 2**-4}[dtype]
    largest = frames.abs().amax(1, keepdim=True)
    assert (
        (read.float() - frames).abs()
        <= error * (largest if dtype == "fp8" else frames.abs()) + (1e-7 if dtype == "fp16" else 0)
    ).all()


def test_fp8_is_half_the_size_of_bf16():
    frames = torch.randn(100, 384)
    assert dequantize(quantize(frames, "fp8")).dtype == torch.bfloat16
    size = {
        d: sum(t.numel() * t.itemsize for t in quantize(frames, d) if t is not None) for d in ("bf16", "fp8")
    }
    assert size["fp8"] / size["bf16"] == pytest.approx(0.505, abs=0.001)


def test_segments_of_one_file_have_their_own_audio_ids():
    complete = Utterance("w", "/x", "t", 10.0, 16000, audio_id_of("file"))
    one, two = (dataclasses.replace(complete, start=s, duration=2.0) for s in (0.0, 2.0))
    assert len({u.audio_id for u in (complete, one, two)}) == 3
    assert len(bytes.fromhex(one.audio_id)) == 32


def test_a_damaged_fingerprint_is_reported_in_one_sentence(tmp_path):
    namespace, _ = publish(tmp_path, some_features())
    write_bytes(f"{namespace.root}/fingerprint.json", json.dumps([1]))
    with pytest.raises(UserError, match="is damaged: remove it"):
        FeatureStore(str(tmp_path))


def test_an_entry_takes_68_bytes(tmp_path):
    _, index = publish(tmp_path, {audio_id_of(i): torch.zeros(0, 4) for i in range(500)})
    for made in (index, Index.from_bytes(index.to_bytes(), "here"), merge(FINGERPRINT, 4, [index])):
        assert sum(column.nbytes for column in made.columns.values()) == 68 * 500
