"""Complete training runs with DeepSpeed's own JSON, and with batches as in the reference implementation."""

import json

import pytest
import torch

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.train import train
from slam_asr.training.live import read_curve

SETTINGS = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture
def trained(prepared, tmp_path):
    """Return a function that trains with a DeepSpeed JSON and returns the losses."""
    recipe, manifests, features = prepared

    def run(name: str, settings: dict, **training) -> list[float]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings))
        options = {
            "training.epochs": 3,
            "training.max_steps": 100,
            "training.learning_rate": 1e-2,
            "training.deepspeed": str(path),
        }
        changed = load_recipe(recipe, options | {f"training.{k}": v for k, v in training.items()})
        record = train(changed, f"{manifests}/train.jsonl", str(tmp_path / name), features)
        return [row["loss"] for row in read_curve(record.file("curve.jsonl"))[0]]

    return run


@pytest.mark.slow
def test_settings_in_the_json_take_effect(trained):
    """With six utterances, two per batch and two batches per step, each of three epochs has two steps."""
    plain = trained("plain", SETTINGS)
    assert len(plain) == 6
    same = trained(
        "same", {**SETTINGS, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}}
    )
    assert same == plain
    other = trained("other", {**SETTINGS, "optimizer": {"type": "AdamW", "params": {"betas": [0.5, 0.6]}}})
    assert other[0] == plain[0] and other[-1] != plain[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused only on a CPU")
def test_the_references_fp16_configuration_is_refused_on_a_cpu():
    reference = {
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    recipe = {"name": "reference", "training": {"deepspeed": reference}}
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(load_recipe(json.dumps(recipe)), "/no/such/manifest", "/no/such/output")
