"""DeepSpeed's JSON in a recipe: settings take effect; contradictions and unknown keys are refused."""

import json

import pytest
import torch

from slam_asr.config.deepspeed import known_keys
from slam_asr.config.recipe import dump_recipe, load_recipe
from slam_asr.errors import UserError
from slam_asr.training.engines.deepspeed_engine import deepspeed_config

REFERENCE = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
"""SLAM-LLM's ds_config.json: ZeRO 3, fp16, the optimiser offloaded to the CPU, batches of 4."""


def recipe_with(settings, **training):
    return load_recipe(json.dumps({"name": "mine", "training": {"deepspeed": settings, **training}}))


def test_slam_llms_configuration_is_accepted():
    training = recipe_with(REFERENCE).training
    assert (training.zero_stage, training.offload_optimizer, training.precision) == (3, True, "fp16")
    assert (training.utterances_per_batch, training.accumulation, training.learning_rate) == (4, 1, 1e-4)
    config = deepspeed_config(training, torch.device("cpu"))
    assert (
        config["zero_optimization"]["stage"] == 3
        and config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    )
    assert config["fp16"] == {"enabled": True}


def test_settings_without_a_recipe_key_reach_deepspeed_and_the_optimiser():
    settings = {
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 1000000,
            "offload_optimizer": {"device": "none", "pin_memory": False},
        },
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "hysteresis": 4},
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        },
    }
    training = recipe_with(settings).training
    assert (
        training.zero_stage,
        training.offload_optimizer,
        training.gradient_clipping,
        training.weight_decay,
    ) == (2, False, 0.5, 0.1)
    config = deepspeed_config(training, torch.device("cpu"))
    assert (
        config["zero_optimization"]["overlap_comm"] is True
        and config["zero_optimization"]["reduce_bucket_size"] == 1000000
    )
    assert (
        config["wall_clock_breakdown"] is True
        and config["bf16"]["enabled"] is True
        and "fp16" not in config
        and "optimizer" not in config
    )
    assert training.deepspeed["optimizer"] == {"params": {"betas": [0.8, 0.95], "eps": 1e-6}}


def test_auto_leaves_every_value_to_the_recipe():
    settings = {
        "fp16": {"enabled": "auto", "loss_scale": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
    }
    training = recipe_with(settings, precision="fp32").training
    assert (training.precision, training.zero_stage, training.utterances_per_batch) == ("fp32", 2, 0)
    assert training.deepspeed == {"fp16": {}, "bf16": {}, "zero_optimization": {}}
    assert deepspeed_config(training, torch.device("cpu"))["zero_optimization"]["stage"] == 2


def test_a_file_is_read_and_the_resolved_recipe_no_longer_needs_it(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(REFERENCE))
    recipe = load_recipe(
        "librispeech",
        {"training.deepspeed": str(path), "training.precision": "fp16", "training.learning_rate": 1e-4},
    )
    path.unlink()
    assert load_recipe(dump_recipe(recipe)) == recipe and recipe.training.zero_stage == 3


@pytest.mark.parametrize(
    ("settings", "training", "sentence"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            {"zero_stage": 2},
            "zero_optimization.stage is 3, but the recipe's training.zero_stage is 2",
        ),
        (
            {"fp16": {"enabled": True}},
            {"precision": "bf16"},
            "fp16.enabled is fp16, but the recipe's training.precision is bf16",
        ),
        (
            {"optimizer": {"params": {"lr": 1e-3}}},
            {"learning_rate": 1e-4},
            "optimizer.params.lr is 0.001, but the recipe's training.learning_rate is 0.0001",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, "fp16 and bf16 are both enabled"),
        (
            {"zero_optimisation": {}},
            {},
            "DeepSpeed has no key zero_optimisation; did you mean zero_optimization?",
        ),
        ({"zero_optimization": {"stge": 3}}, {}, "has no key zero_optimization.stge; did you mean stage?"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            {},
            "has no key zero_optimization.offload_param.nvme_path",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {},
            "offload_optimizer.device is 'nvme': must be cpu or none, not 'nvme'",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "scheduler is not supported: the learning rate follows training.schedule and "
            "training.warmup_steps",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            {},
            "optimizer.type is Lamb, but slam-asr's optimiser is AdamW",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            {},
            "optimizer.params.adam_w_mode is false",
        ),
        ({"train_batch_size": 32}, {}, "sets train_batch_size without train_micro_batch_size_per_gpu"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
            {},
            "without train_micro_batch_size_per_gpu and gradient_accumulation_steps: set all three",
        ),
        ({"zero_optimization": 3}, {}, "zero_optimization must contain keys, not 3"),
        ("/no/such/file.json", {}, "names /no/such/file.json, which cannot be read as JSON"),
        (["a"], {}, "must contain DeepSpeed's keys and values, or name a JSON file"),
    ],
)
def test_contradictions_and_unknown_keys_are_refused_by_name(settings, training, sentence):
    with pytest.raises(UserError) as refused:
        recipe_with(settings, **training)
    assert sentence in str(refused.value) and "\n" not in refused.value.args[0]


def test_other_engines_accept_no_deepspeed_json():
    with pytest.raises(UserError, match=r"training\.deepspeed is DeepSpeed's, but training\.engine is ddp"):
        recipe_with({"wall_clock_breakdown": True}, engine="ddp")


def test_the_key_names_exist_in_the_installed_deepspeed():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    theirs = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for section, kind in theirs.items():
        names = set(kind.model_fields) | {f.alias for f in kind.model_fields.values() if f.alias}
        assert set(known_keys()["checked"][section]) <= names, section


@pytest.mark.parametrize("form", ["path", "keys"])
def test_deepspeeds_json_on_a_stages_command_line_is_refused_and_the_recipes_file_is_named(tmp_path, form):
    from slam_asr.cli import run

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(REFERENCE))
    option = f"--training.deepspeed={path if form == 'path' else json.dumps(REFERENCE)}"
    with pytest.raises(UserError, match="write it into the recipe's file"):
        run("train", ["--recipe", "demo", "--train-manifest", "m", "--output", str(tmp_path / "out"), option])
