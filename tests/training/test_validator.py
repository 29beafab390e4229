"""Validation during training: the transcripts of some dev utterances."""

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.train import train


@pytest.mark.slow
def test_a_recipe_with_n_best_lists_trains_with_one_transcript_per_sample(prepared, tmp_path):
    recipe, manifests, features = prepared
    options = {"training.max_steps": 2, "training.validate_every": 2, "training.samples": 2}
    options |= {"decoding.beams": 3, "decoding.nbest": 3}
    trained = train(
        load_recipe(recipe, options),
        f"{manifests}/train.jsonl",
        str(tmp_path / "training"),
        features,
        f"{manifests}/dev.jsonl",
    )
    assert len(trained.facts["samples"]) == 2
