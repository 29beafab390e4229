"""The recipe's decoding.checkpoint selects the converted checkpoint, in a pipeline and in a single stage."""

from types import SimpleNamespace

import pytest

from components.convert_checkpoint.component import convert_checkpoint
from pipelines import single
from slam_asr.artifacts.stage_record import Outcome, Record, run_stage, write_pointer
from slam_asr.config.recipe import load_recipe
from slam_asr.stages import convert_checkpoint as convert


@pytest.mark.parametrize("which", ["latest", "best"])
def test_step_converts_the_checkpoint_that_the_recipe_selects(which, tmp_path, monkeypatch):
    calls = []

    def run(checkpoint: str, output: str, **options) -> Record:
        calls.append(options)
        return Record("done", stage="convert-checkpoint", folder=str(tmp_path))

    monkeypatch.setattr(convert, "convert_checkpoint", run)
    recipe = load_recipe("demo", {"decoding.checkpoint": which, "decoding.parts": 2})
    trained = run_stage("train", str(tmp_path / "train"), {}, lambda _: Outcome(""))
    write_pointer(trained, tmp_path / "checkpoint", recipe)
    monkeypatch.setattr("slam_asr.artifacts.stage_record.write_pointer", lambda *_: None)
    artifact = SimpleNamespace(path=str(tmp_path / "checkpoint"), log_metric=lambda *_: None)
    assert convert_checkpoint.python_func("store", artifact, artifact, artifact) == ["1/2", "2/2"]
    assert calls == [{"which": which, "recipe": recipe}]


def test_single_stage_converts_the_checkpoint_that_the_recipe_selects(tmp_path, monkeypatch):
    monkeypatch.setattr(single, "follow_pointer", lambda path: str(path))
    monkeypatch.setattr(single, "_latest_pointer", lambda output, earlier, stage: f"{earlier}.json")
    command = single.command_of_stage(
        "convert-checkpoint",
        tmp_path,
        "store",
        tmp_path / "r.yaml",
        "c",
        load_recipe("demo", {"decoding.checkpoint": "best"}),
    )
    assert command[command.index("--which") + 1] == "best"


def test_selected_checkpoint_does_not_change_the_decoding_options():
    from slam_asr.stages.decode import options_that_change_texts

    latest, best = (
        options_that_change_texts(load_recipe("demo", {"decoding.checkpoint": which}).decoding)
        for which in ("latest", "best")
    )
    assert latest == best
