"""Cached features, local or remote, and features encoded on the fly give the same steps, losses and texts."""

import json
import os

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.decode import decode
from slam_asr.stages.extract_features import extract_features
from slam_asr.stages.train import train
from slam_asr.training.live import read_curve
from tests.conftest import write_librispeech

OPTIONS = {
    # With several shards in windows of two, the order of utterances would change if it depended on where the
    # features are.
    "encoder.frames": "all",
    "features.shard_megabytes": 1,
    "features.window_shards": 2,
    "training.epochs": 2,
    "training.max_steps": 100,
    "training.positions_per_step": 1200,
    "training.positions_per_batch": 1200,
    "training.learning_rate": 1e-3,
}
DTYPES = ["fp32", "fp8", *(["bf16"] if os.environ.get("SLAM_ASR_SOAK") else [])]
"""The dtype that loses nothing and the one that loses most; in `make soak` also the default, bf16."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    subsets = {
        f"{split}-tiny": {f"{s}-1-{i:04}": f"word {i}" for i in range(n)}
        for s, (split, n) in enumerate((("train", 50), ("dev", 4), ("test", 4)), 1)
    }
    return write_librispeech(tmp_path_factory.mktemp("corpus"), subsets)


def losses(record):
    curve, validation = read_curve(record.file("curve.jsonl"))
    return [row["loss"] for row in curve] + [row["loss"] for row in validation]


def texts(record):
    return {
        row["key"]: row["hypothesis"]
        for row in map(json.loads, record.file("hypotheses.jsonl").read_text().splitlines())
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_give_the_same_losses_and_texts(tiny_recipe, corpus, tmp_path, bucket, dtype):
    loss_curves, hypotheses = {}, {}
    manifests = build_manifest(load_recipe(str(tiny_recipe), OPTIONS), str(corpus), str(tmp_path / "m"))
    for way, store in (("local", str(tmp_path / "f")), ("remote", "s3://bucket/f"), ("none", None)):
        recipe = load_recipe(
            str(tiny_recipe),
            OPTIONS | {"features.dtype": dtype, "features.cache": "store" if store else "none"},
        )
        features = extract_features(recipe, [manifests.folder], store or str(tmp_path / "n")).folder
        training = train(
            recipe,
            str(manifests.file("train.jsonl")),
            str(tmp_path / way),
            features,
            str(manifests.file("dev.jsonl")),
        )
        model = convert_checkpoint(training.folder, str(tmp_path / f"{way}-model"))
        decoded = decode(
            recipe,
            model.folder,
            [str(manifests.file("test.jsonl"))],
            str(tmp_path / f"{way}-decoded"),
            features,
        )
        loss_curves[way], hypotheses[way] = losses(training), texts(decoded)
    assert len(loss_curves["local"]) > 20
    assert loss_curves["remote"] == loss_curves["local"] and hypotheses["remote"] == hypotheses["local"]
    # If audio is encoded in other batches, sums differ in the last bit, and may be rounded to other values.
    assert loss_curves["none"] == pytest.approx(
        loss_curves["local"], rel={"fp32": 1e-5, "bf16": 1e-3, "fp8": 1e-3}[dtype]
    )
    if dtype == "fp32":
        assert hypotheses["none"] == hypotheses["local"]
