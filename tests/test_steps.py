"""The table of steps is consistent, and a row in it makes a new step appear everywhere.

The step also needs a function, a component and its call in the pipeline.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components import component_of
from pipelines import single
from pipelines.cluster import Cluster
from slam_asr.artifacts.stage_record import follow_pointer, read_record
from slam_asr.config.recipe import load_recipe
from slam_asr.steps import EVERY_PIPELINE, OWN_IMAGE, STEPS

CHECKOUT = Path(__file__).resolve().parents[1]

every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def function_of(step):
    module, name = step.function.split(":")
    return getattr(importlib.import_module(module), name)


@every_step
def test_component_of_a_step_has_the_output_that_points_to_its_result(step):
    assert component_of(step.name).name == step.name
    assert (step.output or None) in (component_of(step.name).component_spec.outputs or {None})


@every_step
def test_function_of_a_step_writes_to_an_output_folder(step):
    if step.function:
        assert "output" in inspect.signature(function_of(step)).parameters


@every_step
def test_a_step_refers_to_steps_and_pipelines_that_exist(step):
    # Only the exit task has no result. Its `pipelines` is empty: a profile can add it to any pipeline.
    assert bool(step.pipelines) == bool(step.output) and set(step.pipelines) <= set(EVERY_PIPELINE)
    assert step.image in ("", *OWN_IMAGE)
    assert not step.settings_of or not STEPS[step.settings_of].settings_of
    assert step.torch in (("cuda", "cpu", "none") if not step.image else ("none",))
    assert Cluster().steps[step.name].cpu


@pytest.mark.parametrize("name", single.RUN_ALONE)
def test_a_step_that_runs_alone_gets_all_that_its_function_needs(name, tmp_path, monkeypatch):
    asked = []

    def latest_pointer(output, earlier, stage):
        asked.append(earlier)
        return output / "steps" / earlier / STEPS[earlier].output

    monkeypatch.setattr(single, "_latest_pointer", latest_pointer)
    monkeypatch.setattr(single, "follow_pointer", lambda path: f"folder of {path.parent.name}")
    words = single.command_of_stage(name, tmp_path, "store", tmp_path, "corpus", load_recipe("demo"))
    parameters = inspect.signature(function_of(STEPS[name])).parameters
    given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    assert given - {"pointer"} <= parameters.keys()
    assert {p.name for p in parameters.values() if p.default is p.empty} <= given
    order = list(STEPS)
    assert all(order.index(earlier) < order.index(name) for earlier in asked)


def test_score_that_runs_alone_reads_all_work_shards_of_the_latest_decoding(tmp_path, monkeypatch):
    def pointer(run: str, iteration: int) -> Path:
        path = tmp_path / "steps" / run / f"for-loop-2-iteration-{iteration}" / "decode" / "hypotheses"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (int(run), int(run)))
        return path

    pointer("1", 0)
    latest = [str(pointer("2", iteration)) for iteration in range(3)]
    monkeypatch.setattr(single, "follow_pointer", str)
    words = single.command_of_stage("score", tmp_path, "s", tmp_path, "c", load_recipe("demo"), model="m")
    first = words.index("--parts") + 1
    assert words[first : first + 4] == [*latest, "--pointer"]


FUNCTION = '''
"""The stage `count-words`: counts the words of a manifest."""

from pathlib import Path

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.stage_record import Outcome, Record, run_stage


def count_words(manifests: list[str], output: str, overwrite: bool = False) -> Record:
    """Count the words of manifests.

    Args:
        manifests: the manifests.
        output: folder of the result.
        overwrite: replace results of other inputs.
    """

    def work(folder: Path) -> Outcome:
        words = sum(len(u.target.split()) for file in manifests for u in read_manifest(file))
        return Outcome(f"{words} words", {"words": words})

    return run_stage("count-words", output, {"manifests": manifests}, work, overwrite)
'''
COMPONENT = '''
"""The Kubeflow component `count-words`."""

from kfp import dsl

from components import image


@dsl.component(base_image=image("count-words"), install_kfp_package=False)
def count_words(store: str, manifests: dsl.Input[dsl.Dataset], words: dsl.Output[dsl.Dataset]) -> None:
    """Count the words of the test set.

    Args:
        store: Folder or s3:// prefix for the results of all stages.
        manifests: Pointer to the result folder of build-manifest.
        words: Pointer to the folder with the counts.
    """
    from slam_asr.counting import count_words as run
    from slam_asr.artifacts.stage_record import follow_pointer, write_pointer

    folder = follow_pointer(manifests.path)
    write_pointer(run([f"{folder}/test.jsonl"], f"{store}/count-words/{{fingerprint}}"), words.path)
'''
ROW = """        Step(
            "count-words",
            "count the words of the test set",
            output="words",
            pipelines=(TRAINING,),
            function="slam_asr.counting:count_words",
            options={"manifests": "{build-manifest}/test.jsonl"},
        ),
"""
CALL = "        counting = count_words(store=store, manifests=manifests)\n"
SETTINGS = "        apply_settings(place, manifest, "


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Copy the project, add a step to the copy, and return a function that runs Python there."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("needs the git checkout, to know which files belong to the project")
    copy = tmp_path_factory.mktemp("project")
    for name in listing.stdout.splitlines():
        if (CHECKOUT / name).is_file() and not name.startswith("demo/speech/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, copy / name)

    (copy / "slam_asr" / "counting.py").write_text(FUNCTION)
    (copy / "components" / "count_words").mkdir()
    (copy / "components" / "count_words" / "__init__.py").touch()
    (copy / "components" / "count_words" / "component.py").write_text(COMPONENT)
    end_of_table = "    )\n}\n"
    replace_once(copy / "slam_asr" / "steps.py", end_of_table, ROW + end_of_table)
    asr = copy / "pipelines" / "asr.py"
    imports = "from components.convert_checkpoint.component"
    replace_once(asr, imports, f"from components.count_words.component import count_words\n{imports}")
    replace_once(asr, SETTINGS, f"{CALL}{SETTINGS}counting, ")

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=copy,
            # Modules come from the copy. Without `tests/warm` on this path, the programs start cold.
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_new_step_is_in_the_compiled_pipeline_with_an_image_and_settings(program, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("steps: {count_words: {cpu: 500m}}")
    program("-m", "pipelines", "compile", "--cluster", str(profile), "--output", str(tmp_path / "kfp"))
    assert (tmp_path / "kfp" / "components" / "count-words.yaml").is_file()
    pipeline = next(yaml.safe_load_all((tmp_path / "kfp" / "slam-asr.yaml").read_text()))
    container = pipeline["deploymentSpec"]["executors"]["exec-count-words"]["container"]
    assert container["image"].startswith("slam-asr/count-words:")
    assert container["resources"]["resourceCpuLimit"] == "500m"


@pytest.mark.slow
def test_new_step_is_a_command(program, tmp_path):
    assert re.search(r"\n  count-words +count the words of the test set\n", program("-m", "slam_asr"))
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"key": "a", "source": "a.wav", "target": "one two three"}) + "\n"
    )
    output = program(
        *("-m", "slam_asr", "count-words", "--manifests", str(tmp_path / "test.jsonl")),
        *("--output", str(tmp_path / "words"), "--pointer", str(tmp_path / "pointer")),
    )
    assert "count-words: 3 words" in output
    assert read_record(follow_pointer(tmp_path / "pointer")).metrics == {"words": 3}


@pytest.mark.slow
def test_new_step_can_run_alone(program, tmp_path):
    words = ("-m", "pipelines", "run", "demo", "--output", str(tmp_path), "--only")
    # `--only` accepts the new step: the error is only that no result of build-manifest exists yet.
    assert "count-words needs the result of build-manifest" in program(*words, "count-words", code=2)


@pytest.mark.slow
def test_new_step_is_documented(program):
    written = program("docs/generate.py").split()
    assert "components/count_words/README.md" in written and "docs/reference/commands.md" in written
