"""The compiled YAML: the same bytes each time, whole, and with the images that were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from components import RESULTS
from slam_asr import __version__

CHECKOUT = Path(__file__).resolve().parents[2]


def compile_to(output: Path, *options: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(output), *options],
        cwd=CHECKOUT, env=os.environ | environment, check=True, capture_output=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_to(folder)
    return folder


def spec_of(path: Path) -> PipelineSpec:
    return json_format.ParseDict(yaml.safe_load(path.read_text()), PipelineSpec())


def images_of(spec: PipelineSpec) -> dict[str, str]:
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    return {name.removeprefix("exec-"): executor["container"]["image"] for name, executor in executors.items()}


def test_same_source_gives_same_bytes(compiled, tmp_path):
    compile_to(tmp_path, PYTHONHASHSEED="7")
    names = sorted(str(f.relative_to(compiled)) for f in compiled.rglob("*.yaml"))
    assert names == sorted(["asr.yaml", *(f"components/{stage}.yaml" for stage in RESULTS)])
    for name in names:
        assert (tmp_path / name).read_bytes() == (compiled / name).read_bytes(), name


def test_pipeline_has_every_stage_in_its_own_image(compiled):
    assert images_of(spec_of(compiled / "asr.yaml")) == {s: f"slam-asr/{s}:{__version__}" for s in RESULTS}


@pytest.mark.parametrize("stage", RESULTS)
def test_each_component_stands_alone(compiled, stage):
    spec = spec_of(compiled / "components" / f"{stage}.yaml")
    assert images_of(spec) == {stage: f"slam-asr/{stage}:{__version__}"}


def test_tasks_form_the_chain(compiled):
    tasks = spec_of(compiled / "asr.yaml").root.dag.tasks
    assert {name: sorted(task.dependent_tasks) for name, task in tasks.items()} == {
        "build-manifest": [],
        "for-loop-1": ["build-manifest"],
        "train": ["build-manifest", "for-loop-1"],
        "convert-checkpoint": ["train"],
        "decode": ["build-manifest", "convert-checkpoint", "for-loop-1"],
    }
    loop = tasks["for-loop-1"]
    assert loop.parameter_iterator.items.input_parameter.endswith("build-manifest-Output")
    assert list(spec_of(compiled / "asr.yaml").components["comp-for-loop-1"].dag.tasks) == ["extract-features"]
    del tasks["for-loop-1"]
    assert [name for name, task in tasks.items() if task.caching_options.enable_cache] == []


def test_inputs_and_parameters_are_explained(compiled):
    spec = spec_of(compiled / "asr.yaml")
    # A loop's inputs are kfp's own; those of the steps in it are explained with the others.
    steps = [(name, component) for name, component in spec.components.items() if not component.HasField("dag")]
    for name, component in [("asr", spec.root), *steps]:
        inputs = component.input_definitions
        for kind in (inputs.parameters, inputs.artifacts):
            assert [key for key, value in kind.items() if not value.description] == [], name


def test_images_are_named_at_compile_time(tmp_path):
    template = "registry.example/team/{stage}:{version}-gpu"
    wanted = {s: f"registry.example/team/{s}:{__version__}-gpu" for s in RESULTS}
    compile_to(tmp_path / "by-option.yaml", "--images", template)
    compile_to(tmp_path / "by-variable.yaml", SLAM_ASR_IMAGES=template)
    assert images_of(spec_of(tmp_path / "by-option.yaml")) == wanted
    assert images_of(spec_of(tmp_path / "by-variable.yaml")) == wanted
