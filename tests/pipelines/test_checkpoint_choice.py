"""The recipe says which checkpoint becomes the model, in the pipeline's step as in a stage run by itself."""

from types import SimpleNamespace

import pytest

from components.convert_checkpoint.component import convert_checkpoint
from pipelines import single
from slam_asr.conversion import convert
from slam_asr.recipe import dump_recipe, load_recipe
from slam_asr.stage import Record


@pytest.mark.parametrize("which", ["latest", "best"])
def test_the_step_converts_the_checkpoint_that_the_recipe_names(which, tmp_path, monkeypatch):
    asked = []

    def run(checkpoint: str, output: str, **options) -> Record:
        asked.append(options)
        return Record("done", stage="convert-checkpoint", folder=str(tmp_path))

    monkeypatch.setattr(convert, "convert_checkpoint", run)
    for name in ("follow_pointer", "write_pointer"):
        monkeypatch.setattr(f"slam_asr.stage.{name}", lambda *_: str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(load_recipe("demo", {"decoding.checkpoint": which, "decoding.parts": 2})))
    artifact = SimpleNamespace(path=str(recipe), log_metric=lambda *_: None)
    assert convert_checkpoint.python_func("store", artifact, artifact, artifact, artifact) == ["1/2", "2/2"]
    assert asked == [{"which": which}]


def test_a_stage_by_itself_does_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(single, "follow_pointer", lambda path: str(path))
    monkeypatch.setattr(single, "_latest", lambda output, of, stage: f"{of}.json")
    command = single.command_of_stage(
        "convert-checkpoint",
        tmp_path,
        "store",
        tmp_path / "r.yaml",
        "c",
        load_recipe("demo", {"decoding.checkpoint": "best"}),
    )
    assert command[command.index("--which") + 1] == "best"


def test_the_choice_is_no_option_of_decoding():
    from slam_asr.scoring.score import what_decides_the_texts

    latest, best = (
        what_decides_the_texts(load_recipe("demo", {"decoding.checkpoint": which}).decoding)
        for which in ("latest", "best")
    )
    assert latest == best
