"""A converted model is verified before it is published: a single wrong weight is enough to refuse it."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from slam_asr.artifacts import model_folder as folders
from slam_asr.config.recipe import load_recipe
from slam_asr.conversion import writers
from slam_asr.errors import UserError
from slam_asr.models.projector import build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_recipe, tmp_path_factory) -> str:
    """SLAM-LLM's `model.pt` for the tiny models."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    weights = build_projector(load_recipe(str(tiny_recipe)).projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{name}": t for name, t in weights.items()}, path)
    return str(path)


@pytest.mark.parametrize("half", [False, True])
def test_summary_states_the_probes_loss_per_token(checkpoint, tiny_recipe, tmp_path, half):
    record = convert_checkpoint(
        checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)), half=half
    )
    stated = re.search(
        r"loss (\d+\.\d+) per token on random audio, the same before and after", record.summary
    )
    # Random models guess: the mean cross-entropy of a token is about that of a uniform distribution.
    assert stated and 0 < float(stated[1]) < 20
    assert (
        "not compared"
        in convert_checkpoint(
            checkpoint, str(tmp_path / "u"), recipe=load_recipe(str(tiny_recipe)), half=half, verify=False
        ).summary
    )


def test_nothing_is_published_if_a_single_weight_is_wrong(checkpoint, tiny_recipe, tmp_path, monkeypatch):
    write = folders.write_model

    def write_wrong_bias(folder, *arguments, **options):
        write(folder, *arguments, **options)
        weights = load_file(folder / folders.WEIGHTS)
        weights["linear2.bias"][3] += 1e-3
        save_file(weights, folder / folders.WEIGHTS)

    monkeypatch.setattr(writers, "write_model", write_wrong_bias)
    with pytest.raises(
        UserError, match=r"is not what the checkpoint holds: 1 of 4 weights differ, first linear2.bias"
    ):
        convert_checkpoint(checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)))
    assert not (tmp_path / "m" / "config.json").exists() and not (tmp_path / "m" / "stage.json").exists()
    with pytest.raises(UserError, match="holds no model"):
        folders.read_config(tmp_path / "m")


def test_slam_llms_file_is_verified_too(checkpoint, tiny_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(str(tiny_recipe))
    convert_checkpoint(checkpoint, str(tmp_path / "right"), to="slam-llm", recipe=recipe)
    write = writers.write_slam_llm
    monkeypatch.setattr(
        writers,
        "write_slam_llm",
        lambda folder, projector, adapter: write(
            folder, {n: t.roll(1) for n, t in projector.items()}, adapter
        ),
    )
    with pytest.raises(UserError, match=r"4 of 4 weights differ"):
        convert_checkpoint(checkpoint, str(tmp_path / "wrong"), to="slam-llm", recipe=recipe)
    assert (tmp_path / "right" / "model.pt").exists() and not (tmp_path / "wrong" / "model.pt").exists()


def test_the_loss_detects_a_model_that_computes_differently_with_the_same_weights(
    checkpoint, tiny_recipe, tmp_path, monkeypatch
):
    read = folders.read_projector

    def read_reversed(*arguments):
        projector = read(*arguments)
        projector.linear2.register_forward_hook(lambda module, inputs, output: output.flip(-1))
        return projector

    monkeypatch.setattr("slam_asr.conversion.verification.read_projector", read_reversed)
    with pytest.raises(UserError, match=r"the loss on 3 utterances is"):
        convert_checkpoint(checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)))
