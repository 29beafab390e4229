"""Each component documents its parameters and runs in its image, and a metric may be NaN."""

import inspect
import json
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from components import component_of, image
from slam_asr import __version__
from slam_asr.artifacts.stage_record import Outcome, run_stage, write_pointer
from slam_asr.config.recipe import load_recipe
from slam_asr.steps import STEPS


@pytest.mark.parametrize("stage", STEPS)
def test_every_input_and_output_is_documented(stage):
    function = component_of(stage).python_func
    documented = inspect.getdoc(function).partition("Args:")[2]
    assert [name for name in inspect.signature(function).parameters if f"{name}: " not in documented] == []


@pytest.mark.parametrize("stage", STEPS)
def test_each_component_runs_in_its_image(stage):
    assert component_of(stage).component_spec.implementation.container.image == image(stage)


def test_images_follow_the_template(monkeypatch):
    monkeypatch.setenv("SLAM_ASR_IMAGES", "registry.example/{version}/{stage}")
    assert image("train") == f"registry.example/{__version__}/train"
    monkeypatch.delenv("SLAM_ASR_IMAGES")
    assert image("train") == f"slam-asr/train:{__version__}"


def test_a_loss_of_nan_does_not_fail_the_step(tmp_path, monkeypatch):
    def diverge(*_, **__):
        def work(folder: Path) -> Outcome:
            (folder / "curves.html").write_text("<p>")
            return Outcome("diverged", {"loss": math.nan, "steps": 3})

        return run_stage("train", str(tmp_path / "train"), {}, work)

    module = types.ModuleType("slam_asr.stages.train")
    module.train = diverge
    monkeypatch.setitem(sys.modules, "slam_asr.stages.train", module)
    before = run_stage("before", str(tmp_path / "before"), {}, lambda _: Outcome(""))
    write_pointer(before, tmp_path / "pointer", load_recipe("demo"))
    logged = {}
    component_of("train").python_func(
        store=str(tmp_path),
        manifests=SimpleNamespace(path=tmp_path / "pointer"),
        features=[SimpleNamespace(path=tmp_path / "pointer")] * 2,
        checkpoint=SimpleNamespace(path=tmp_path / "checkpoint"),
        curves=SimpleNamespace(path=tmp_path / "curves"),
        training_metrics=SimpleNamespace(log_metric=logged.__setitem__),
    )
    assert logged == {"loss": "nan", "steps": 3}
    assert json.loads(json.dumps(logged, allow_nan=False)) == logged
