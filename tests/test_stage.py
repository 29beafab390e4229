"""A stage's folder is complete or ignored, and the same inputs are never processed twice."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from slam_asr.artifacts.stage_record import (
    RECORD,
    Outcome,
    follow_pointer,
    read_record,
    recipe_of,
    require_record,
    run_stage,
    write_pointer,
)
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import InputError, UserError


def counting(calls):
    """Return a stage's work that appends its folder to `calls`."""

    def work(folder):
        calls.append(folder)
        (folder / "result").write_text("42")
        return Outcome("one result", {"results": 1})

    return work


def test_the_same_inputs_are_processed_once(tmp_path):
    calls = []
    first = run_stage("train", str(tmp_path / "out"), {"a": 1}, counting(calls))
    second = run_stage("train", str(tmp_path / "out"), {"a": 1}, counting(calls))
    assert len(calls) == 1
    assert first == second


def test_a_stage_that_fails_leaves_no_record_and_is_repeated(tmp_path):
    def failing(folder):
        (folder / "half").write_text("4")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_stage("train", str(tmp_path), {}, failing)
    assert read_record(tmp_path) is None
    calls = []
    run_stage("train", str(tmp_path), {}, counting(calls))
    assert calls


def test_results_of_other_inputs_are_replaced_only_on_request(tmp_path):
    calls = []
    run_stage("train", str(tmp_path), {"a": 1, "b": 1}, counting(calls))
    with pytest.raises(UserError, match=r"changed: b\)"):
        run_stage("train", str(tmp_path), {"a": 1, "b": 2}, counting(calls))
    run_stage("train", str(tmp_path), {"a": 1, "b": 2}, counting(calls), overwrite=True)
    assert len(calls) == 2


def test_only_one_run_at_a_time_works_in_a_folder(tmp_path):
    def slow(folder):
        marker = folder / "busy"
        assert not marker.exists()
        marker.touch()
        time.sleep(0.3)
        marker.unlink()
        return Outcome("done")

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_stage, "train", str(tmp_path / "out"), {}, slow) for _ in range(4)]
    assert len({r.result().seconds for r in runs}) == 1


def test_a_file_in_place_of_the_folder_is_reported_in_one_sentence(tmp_path, capsys):
    from slam_asr.errors import exit_on_user_error

    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as exited, exit_on_user_error():
            run_stage("train", str(output), {}, counting([]))
        assert exited.value.code == 2
        shown = capsys.readouterr().err
        # A `UserError` shows a line break in its message as `\n`, so there must be none of these either.
        assert "but a folder is needed" in shown and shown.count("\n") == 1 and r"\n" not in shown


def test_the_fingerprint_gives_each_set_of_inputs_its_own_folder(tmp_path):
    folders = {
        run_stage("train", str(tmp_path / "{fingerprint}"), {"a": a}, counting([])).folder for a in (1, 2, 1)
    }
    assert len(folders) == 2


def test_a_pointer_is_valid_until_the_folder_changes(tmp_path):
    record = run_stage("train", str(tmp_path / "out"), {"a": 1}, counting([]))
    write_pointer(record, tmp_path / "pointer")
    assert follow_pointer(tmp_path / "pointer") == record.folder
    assert json.loads((tmp_path / "pointer").read_text())["bytes"] > 0
    (tmp_path / "out" / RECORD).write_text("{}")
    with pytest.raises(UserError, match="gone or was replaced"):
        follow_pointer(tmp_path / "pointer")


def test_a_pointer_carries_the_recipe_of_the_run(tmp_path):
    record = run_stage("train", str(tmp_path / "out"), {"a": 1}, counting([]))
    # JSON writes the small numbers as 1e-05 and 1e-08, which are text in YAML.
    recipe = load_recipe(
        "demo",
        {
            "name": "größer: 1",
            "training.learning_rate": 1e-5,
            "training.deepspeed": {"optimizer": {"params": {"eps": 1e-8}}},
            "published_wer": {"test-clean": 1.0},
        },
    )
    write_pointer(record, tmp_path / "pointer", recipe)
    assert recipe_of(tmp_path / "pointer") == recipe
    assert follow_pointer(tmp_path / "pointer") == record.folder


def test_a_pointer_without_a_recipe_is_refused_where_one_is_needed(tmp_path):
    record = run_stage("train", str(tmp_path / "out"), {"a": 1}, counting([]))
    write_pointer(record, tmp_path / "pointer")
    with pytest.raises(InputError, match=r"has no recipe, .* run the previous step again"):
        recipe_of(tmp_path / "pointer")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"uri": 3}'])
def test_a_damaged_pointer_is_refused(tmp_path, content):
    (tmp_path / "pointer").write_text(content)
    with pytest.raises(UserError, match="not a pointer"):
        follow_pointer(tmp_path / "pointer")


def test_a_stage_refuses_another_stages_folder(tmp_path):
    run_stage("train", str(tmp_path), {}, counting([]))
    with pytest.raises(UserError, match="written by train, not by build-manifest"):
        require_record(tmp_path, "build-manifest")
    with pytest.raises(UserError, match="no finished train"):
        require_record(tmp_path / "nowhere", "train")
