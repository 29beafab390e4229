"""An interruption loses only the work since the last piece, and the store has the same bytes in the end."""

import pytest
import torch

from slam_asr.artifacts.feature_store.namespace import FeatureNamespace, pack, unpack
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.cli import run
from slam_asr.errors import StorageError
from slam_asr.features import encode
from slam_asr.features.encode import AudioBatch, EncodedBatch, ShardWriter
from slam_asr.features.plan import Audio, ExtractionTask, PlannedShard
from slam_asr.models.feature_dtype import quantize
from slam_asr.stages.extract_features import extract_features
from slam_asr.storage import join, read_bytes, walk, write_bytes
from tests.features.conftest import utterances_in
from tests.features.test_extract import SMALL, contents, recipe
from tests.utterances import write_manifest


@pytest.fixture(scope="module")
def twenty(tiny_models, tmp_path_factory):
    """Return a manifest for two shards of five batches of two, and the files of an undisturbed store."""
    folder = tmp_path_factory.mktemp("twenty")
    write_manifest(folder / "m.jsonl", utterances_in(folder, [0.2 + 0.01 * i for i in range(20)]))
    extract_features(recipe(tiny_models, **SMALL), [str(folder / "m.jsonl")], str(folder / "store"))
    return str(folder / "m.jsonl"), contents(folder / "store")


def pieces_in(store: str) -> list[str]:
    return [f.name for f in walk(store) if "/pieces/" in f.name]


def interrupted(store: str, manifest: str, options, monkeypatch, after: int) -> None:
    """Run an extraction that saves each batch as a piece, and interrupt it after some batches."""
    added = []

    def dying(self, encoded, real=ShardWriter.add):
        if len(added) == after:
            self.finish()
            raise KeyboardInterrupt
        added.append(encoded)
        real(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "PIECE_SECONDS", 0.0)
        patch.setattr(ShardWriter, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            extract_features(options, [manifest], store)


@pytest.mark.parametrize("kind", ["prefix", "damaged", "other batches"])
def test_batches_saved_before_an_interruption_are_not_computed_again(
    kind, request, tiny_models, twenty, tmp_path, monkeypatch, capsys
):
    manifest, undisturbed = twenty
    store = str(tmp_path / "store")
    if kind == "prefix":
        request.getfixturevalue("bucket")
        store = "s3://bucket/store"
    interrupted(store, manifest, recipe(tiny_models, **SMALL), monkeypatch, after=8)
    assert len(pieces_in(store)) == 3 and all("/000001/" in name for name in pieces_in(store))
    if kind == "damaged":
        path = join(store, pieces_in(store)[0])
        content = bytearray(read_bytes(path))
        content[-1] ^= 1
        write_bytes(path, bytes(content))
    encoded = []

    def counted(batch, features, real=encode._copy_to_host):
        encoded.append(len(batch.utterances))
        return real(batch, features)

    monkeypatch.setattr(encode, "_copy_to_host", counted)
    # With batches of four, four and two utterances, only the first one consists of saved utterances.
    options = recipe(tiny_models, **SMALL | ({"encoder.batch_seconds": 120} if "other" in kind else {}))
    capsys.readouterr()
    extract_features(options, [manifest], store)
    saved = {"prefix": 6, "damaged": 4, "other batches": 4}[kind]
    assert sum(encoded) == 10 - saved
    assert f"resuming: {saved} utterances of an unfinished shard" in capsys.readouterr().out
    assert pieces_in(store) == []
    if kind != "other batches":  # in other batches, values are rounded differently
        assert contents(store) == undisturbed
    assert len(FeatureStore(store).index) == 20


def test_pieces_of_unfinished_shards_are_listed_and_pruned(
    tiny_models, twenty, tmp_path, monkeypatch, capsys
):
    store = str(tmp_path / "store")
    interrupted(store, twenty[0], recipe(tiny_models, **SMALL), monkeypatch, after=3)
    run("features", ["ls", store])
    assert "pieces of shards that an unfinished extraction has begun: 3" in capsys.readouterr().out
    run("features", ["prune", store, "--yes", "true"])
    assert len(pieces_in(store)) == 3
    run("features", ["prune", store, "--unfinished", "true", "--yes", "true"])
    assert pieces_in(store) == []


@pytest.fixture
def writing(tmp_path):
    """Return a writer of a shard, and a function that sets its clock, adds a batch and counts its pieces."""
    now = [0.0]
    task = ExtractionTask(None, None, FeatureNamespace(str(tmp_path)), {"dtype": "fp32"})
    writer = ShardWriter(task, clock=lambda: now[0])

    class Named:
        def __init__(self, number: int) -> None:
            self.audio_id = f"{number:064x}"

    numbers = iter(range(100))
    shard = PlannedShard(
        0, Audio([], *[torch.zeros(0).numpy()] * 3), str(tmp_path / "receipt"), str(tmp_path / "pieces")
    )

    def add(seconds: float, is_last: bool = False) -> int:
        now[0] = seconds
        batch = AudioBatch(shard, [Named(next(numbers))], [2], is_last)
        writer.add(EncodedBatch(batch, [quantize(torch.ones(2, 4), "fp32")]))
        writer.finish()
        return len(list(walk(shard.pieces)))

    return writer, add


def test_a_piece_is_saved_every_three_minutes(writing, tmp_path):
    _, add = writing
    assert [add(s) for s in (10, 179, 181, 200, 360, 362)] == [0, 0, 1, 1, 1, 2]
    sizes = sorted(
        len(unpack(read_bytes(join(tmp_path, "pieces", f.name)))) for f in walk(tmp_path / "pieces")
    )
    assert sizes == [3, 3], "each piece holds only new features"
    assert add(363, is_last=True) == 0
    assert len(list(walk(tmp_path / "shards"))) == 1
    assert [add(s) for s in (400, 544)] == [0, 1], "the time begins again with each shard"


def test_a_piece_that_cannot_be_saved_does_not_stop_the_extraction(writing, tmp_path, monkeypatch, capsys):
    _, add = writing

    def full(path, content):
        raise StorageError("the bucket's quota is used up")

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_bytes", full)
        assert add(200) == 0
    assert "warning: the features so far could not be saved" in capsys.readouterr().out
    add(201, is_last=True)
    assert len(list(walk(tmp_path / "shards"))) == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_what_is_packed_is_unpacked_unchanged(dtype):
    features = {f"{i:064x}": quantize(torch.randn(3 + i, 8), dtype) for i in range(3)}
    unpacked = unpack(pack(features, {}, dict.fromkeys(features, 1))[0])
    assert unpacked.keys() == features.keys()
    for audio_id, (frames, scales) in features.items():
        assert torch.equal(unpacked[audio_id].frames.float(), frames.float())
        assert unpacked[audio_id].frames.dtype == frames.dtype
        assert (scales is None) == (unpacked[audio_id].scales is None)
        assert scales is None or torch.equal(unpacked[audio_id].scales, scales)
