"""A model that is only evaluated must fit the recipe's features; it gets a record like a stage's result."""

from dataclasses import replace

import pytest
import torch

from slam_asr.artifacts.model_folder import ModelConfig, write_model
from slam_asr.artifacts.stage_record import Outcome, follow_pointer, run_stage, write_pointer
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.conversion.trained import adopt_trained_model
from slam_asr.errors import UserError
from slam_asr.models.projector import build_projector

REQUESTED = load_recipe("demo", {"data.train": [], "data.dev": []})


def write(folder, recipe: Recipe) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    projector = build_projector(recipe.projector, 8, 4)
    write_model(folder, projector.state_dict(), ModelConfig(dump_recipe(recipe), {"weights": "e"}, "l", 8, 4))


def refusal(recipe: Recipe, model) -> str:
    with pytest.raises(UserError) as caught:
        adopt_trained_model(recipe, str(model), "{fingerprint}")
    assert "\n" not in caught.value.args[0]
    return str(caught.value)


def test_a_model_without_a_record_is_copied_once_and_can_be_pointed_to(tmp_path):
    write(tmp_path / "model", load_recipe("demo"))
    record = adopt_trained_model(
        REQUESTED, str(tmp_path / "model"), str(tmp_path / "store" / "{fingerprint}")
    )
    write_pointer(record, tmp_path / "pointer")
    folder = follow_pointer(tmp_path / "pointer")
    for file in (tmp_path / "model").iterdir():
        assert record.file(file.name).read_bytes() == file.read_bytes()
    assert (
        adopt_trained_model(
            REQUESTED, str(tmp_path / "model"), str(tmp_path / "store" / "{fingerprint}")
        ).folder
        == folder
    )


def test_a_model_with_a_record_is_not_copied(tmp_path):
    made = run_stage(
        "convert-checkpoint",
        str(tmp_path / "model"),
        {},
        lambda folder: write(folder, load_recipe("demo")) or Outcome("done"),
    )
    assert (
        adopt_trained_model(REQUESTED, str(tmp_path / "model"), str(tmp_path / "store" / "{fingerprint}"))
        == made
    )
    assert not (tmp_path / "store").exists()


def test_a_model_of_other_features_is_refused_with_the_options_that_correct_it(tmp_path):
    trained = load_recipe("demo")
    write(tmp_path / "model", replace(trained, features=replace(trained.features, dtype="fp32")))
    assert "features.dtype is bf16, not fp32" in refusal(REQUESTED, tmp_path / "model")
    assert refusal(REQUESTED, tmp_path / "model").endswith("add --features.dtype fp32.")


def test_the_encoders_folder_does_not_matter(tmp_path):
    trained = load_recipe("demo")
    write(
        tmp_path / "model",
        replace(
            trained,
            encoder=replace(trained.encoder, name=f"/models/{trained.encoder.name.rpartition('/')[2]}/"),
        ),
    )
    assert (
        adopt_trained_model(
            REQUESTED, str(tmp_path / "model"), str(tmp_path / "store" / "{fingerprint}")
        ).stage
        == "open-model"
    )


def test_a_recipe_with_subsets_to_train_on_is_refused(tmp_path):
    write(tmp_path / "model", load_recipe("demo"))
    assert "set both to []" in refusal(load_recipe("demo"), tmp_path / "model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "holds no model" in refusal(REQUESTED, tmp_path)
