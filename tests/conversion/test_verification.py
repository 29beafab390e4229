"""A conversion is compared with its checkpoint before it counts: one that went wrong in a single weight is never published."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from slam_asr.conversion import model as folders
from slam_asr.conversion import slam_llm
from slam_asr.conversion.convert import convert_checkpoint
from slam_asr.errors import UserError
from slam_asr.models.projector import build_projector
from slam_asr.recipe import load_recipe


@pytest.fixture(scope="module")
def checkpoint(tiny_recipe, tmp_path_factory) -> str:
    """SLAM-LLM's, of the tiny models."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    weights = build_projector(load_recipe(str(tiny_recipe)).projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{name}": t for name, t in weights.items()}, path)
    return str(path)


@pytest.mark.parametrize("half", [False, True])
def test_the_loss_is_told(checkpoint, tiny_recipe, tmp_path, half):
    record = convert_checkpoint(
        checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)), half=half
    )
    assert "loss " in record.summary and "before and after" in record.summary
    assert (
        "not compared"
        in convert_checkpoint(
            checkpoint, str(tmp_path / "u"), recipe=load_recipe(str(tiny_recipe)), half=half, verify=False
        ).summary
    )


def test_one_weight_that_was_written_wrongly_publishes_nothing(
    checkpoint, tiny_recipe, tmp_path, monkeypatch
):
    write = folders.write_model

    def wrongly(folder, *arguments, **options):
        write(folder, *arguments, **options)
        weights = load_file(folder / folders.WEIGHTS)
        weights["linear2.bias"][3] += 1e-3
        save_file(weights, folder / folders.WEIGHTS)

    monkeypatch.setattr(folders, "write_model", wrongly)
    with pytest.raises(
        UserError, match=r"is not what the checkpoint holds: 1 of 4 weights differ, first linear2.bias"
    ):
        convert_checkpoint(checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)))
    assert not (tmp_path / "m" / "config.json").exists() and not (tmp_path / "m" / "stage.json").exists()
    with pytest.raises(UserError, match="holds no model"):
        folders.read_config(tmp_path / "m")


def test_slam_llms_file_is_compared_too(checkpoint, tiny_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(str(tiny_recipe))
    convert_checkpoint(checkpoint, str(tmp_path / "right"), to="slam-llm", recipe=recipe)
    write = slam_llm.write_slam_llm
    monkeypatch.setattr(
        slam_llm,
        "write_slam_llm",
        lambda folder, projector, adapter: write(
            folder, {n: t.roll(1) for n, t in projector.items()}, adapter
        ),
    )
    with pytest.raises(UserError, match=r"4 of 4 weights differ"):
        convert_checkpoint(checkpoint, str(tmp_path / "wrong"), to="slam-llm", recipe=recipe)
    assert (tmp_path / "right" / "model.pt").exists() and not (tmp_path / "wrong" / "model.pt").exists()


def test_reading_that_computes_otherwise_is_found_by_the_loss(checkpoint, tiny_recipe, tmp_path, monkeypatch):
    """All weights equal, and still another model: only computing with it tells."""
    read = folders.read_projector

    def otherwise(*arguments):
        projector = read(*arguments)
        projector.linear2.register_forward_hook(lambda *_: _[2].flip(-1))
        return projector

    monkeypatch.setattr("slam_asr.conversion.verification.read_projector", otherwise)
    with pytest.raises(UserError, match=r"the loss on 3 utterances is"):
        convert_checkpoint(checkpoint, str(tmp_path / "m"), recipe=load_recipe(str(tiny_recipe)))
