"""One and two processes have the same losses, step by step, and a failed training leaves no record."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from slam_asr.artifacts.stage_record import read_record
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.stages.extract_features import extract_features
from slam_asr.stages.train import train
from slam_asr.training.live import read_curve
from tests.test_chain import short_utterances

REAL = {
    "training.precision": "fp32",
    "training.positions_per_step": 300,
    "training.max_steps": 4,
    "training.epochs": 2,
    "training.validate_every": 2,
    "training.learning_rate": 1e-4,
    "training.warmup_steps": 4,
    "training.samples": 0,
    "features.dtype": "fp32",
}
"""Options with the published learning rate.

Adam's first updates are almost the signs of the gradient. At ten times this rate, the rounding errors of a
different order of summation grow to 1e-3 within five steps, even if both runs use a single process.
"""

NOISE = 3e-4
"""Relative tolerance for losses.

Before the first update, two orders of summation differ by 1e-6. A few updates of Adam amplify this difference
to up to 1e-4, depending on the machine.
"""


@pytest.fixture(scope="module")
def prepared(libri_mini, tmp_path_factory):
    """A folder, manifests and features of real speech: 16 train and 4 dev utterances of 2 to 4.5 s."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = load_recipe("librispeech", REAL | {"training.positions_per_batch": 300})
    corpus = folder / "corpus"
    corpus.mkdir()
    rows = [json.dumps(row) + "\n" for row in itertools.islice(short_utterances(libri_mini), 24)]
    for split, lines in (("train", rows[:16]), ("dev", rows[16:20]), ("test", rows[20:])):
        (corpus / f"{split}.jsonl").write_text("".join(lines))
    manifests = Path(build_manifest(recipe, str(corpus), str(folder / "manifests")).folder)
    features = extract_features(
        recipe, [str(manifests / f"{split}.jsonl") for split in ("train", "dev")], str(folder / "features")
    )
    return folder, manifests, features.folder


def losses(prepared, name, **overrides):
    folder, manifests, features = prepared
    recipe = load_recipe("librispeech", REAL | overrides)
    record = train(
        recipe, str(manifests / "train.jsonl"), str(folder / name), features, str(manifests / "dev.jsonl")
    )
    curve, validation = read_curve(record.file("curve.jsonl"))
    return [row["loss"] for row in curve], [row["loss"] for row in validation]


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_losses(prepared):
    one, dev_one = losses(prepared, "one", **{"training.processes": 1, "training.positions_per_batch": 300})
    # The micro-batches are smaller too, because accumulation must not change the losses either.
    two, dev_two = losses(prepared, "two", **{"training.processes": 2, "training.positions_per_batch": 110})
    assert len(one) == 4 and len(dev_one) == 2
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two == pytest.approx(one, rel=NOISE)
    assert dev_two == pytest.approx(dev_one, rel=NOISE)
    assert len(set(one)) == 4 and one[-1] < one[0]


def test_features_of_another_encoder_are_refused_before_training(tiny_recipe, tiny_corpus, tmp_path):
    recipe = load_recipe(str(tiny_recipe))
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    other = load_recipe(str(tiny_recipe), {"encoder.frames": "all"})
    with pytest.raises(UserError, match="frames: store speech, model all"):
        train(other, str(built.file("train.jsonl")), str(tmp_path / "t"), features.folder)


@pytest.mark.slow
def test_a_failing_process_ends_training_with_its_message(tiny_recipe, tiny_corpus, tmp_path):
    recipe = load_recipe(
        str(tiny_recipe), {"training.learning_rate": 1e30, "training.max_steps": 20, "training.epochs": 20}
    )
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    with pytest.raises(UserError, match=r"lower training\.learning_rate"):
        train(recipe, str(built.file("train.jsonl")), str(tmp_path / "t"), features.folder)
    assert read_record(tmp_path / "t") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused only on a CPU")
def test_fp16_on_a_cpu_is_refused_before_anything_is_read(tiny_recipe, tmp_path):
    recipe = load_recipe(str(tiny_recipe), {"training.precision": "fp16"})
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(recipe, "/no/such/manifest", str(tmp_path), "/no/such/store")


def test_the_seed_affects_weights_but_processes_and_logging_do_not(tiny_recipe):
    from slam_asr.config.recipe import settings_that_affect_weights

    plain = settings_that_affect_weights(load_recipe(str(tiny_recipe)))
    assert plain == settings_that_affect_weights(
        load_recipe(str(tiny_recipe), {"training.processes": 2, "training.log_every": 3})
    )
    assert plain != settings_that_affect_weights(load_recipe(str(tiny_recipe), {"training.seed": 3}))
    json.dumps(plain)
