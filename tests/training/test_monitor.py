"""A training run reports the same in the log, the curve, the page, TensorBoard's files and other trackers."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.training import live, trackers
from slam_asr.training.live import read_curve, write_page
from slam_asr.training.monitor import Monitor, StepNumbers
from slam_asr.training.validator import Samples


def numbers(step: int, **changed) -> StepNumbers:
    values = {
        "step": step,
        "epoch": 0,
        "loss": 3.0 / step,
        "accuracy": 0.5,
        "learning_rate": 1e-4,
        "gradient_norm": 0.25,
        "padding": 0.2,
        "positions": 800,
        "audio_seconds": 60.0,
    }
    return StepNumbers(**values | changed)


def monitor(folder: Path, total: int = 4, done: int = 0, phase: str = "main", **options) -> Monitor:
    recipe = load_recipe(
        "demo", {"training.log_every": 2, **{f"training.{k}": v for k, v in options.items()}}
    )
    made = Monitor(folder, recipe, done, torch.device("cpu"), None)
    made.enter(phase, 4e9, 1e20, total, total)
    return made


SAMPLES = Samples(
    0.25,
    [
        {"key": "a-1", "reference": "one two", "hypothesis": "one <too>"},
        {"key": "b-2", "reference": "three", "hypothesis": ""},
    ],
)


def train(folder: Path, **options) -> None:
    monitored = monitor(folder, **options)
    for step in (1, 2, 3, 4):
        monitored.step(
            numbers(
                step,
                loss=float("nan") if step == 3 else 3.0 / step,
                gradient_norm=None if step == 3 else 0.25,
            )
        )
    monitored.validation(4, 0.75, 0.625, SAMPLES)
    monitored.close()


def test_log_curve_and_page_agree(tmp_path, capsys):
    train(tmp_path)
    log = capsys.readouterr().out
    assert re.search(
        r"step 2/4, epoch 1: loss 1\.5000, accuracy 0\.500, learning rate 1\.00e-04, gradient norm 0\.25, "
        r"\d+ positions/s \(20% padding\), [\d.e+]+ TFLOP/s \(\d+% of the peak\), \d+ h of audio per hour, "
        r"[\d.]+ GB, ETA ",
        log,
    )
    assert "step 4: dev loss 0.7500, dev accuracy 0.625, WER 25.0 % on 2 dev utterances" in log
    assert "a-1: one <too>\n  ref: one two" in log and "b-2: (nothing)" in log
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert (
        [row["step"] for row in rows] == [1, 2, 3, 4, 4]
        and rows[2]["loss"] is None
        and rows[2]["gradient_norm"] is None
    )
    training, validation = read_curve(tmp_path / "curve.jsonl")
    assert len(training) == 4 and validation == [{"step": 4, "loss": 0.75, "accuracy": 0.625, "wer": 0.25}]
    shown = write_page(tmp_path, load_recipe("demo"), [("Time", "1:00")])
    page = (tmp_path / "curves.html").read_text()
    assert (
        "one &lt;too&gt;" in page
        and "(nothing)" in page
        and "Word error rate" in page
        and "25.0\u202f%" in page
    )
    assert shown["samples"] == SAMPLES.texts and len(shown["curve"]) == 4


def test_a_curve_is_json_even_if_a_dev_loss_is_not_finite(tmp_path):
    monitored = monitor(tmp_path)
    monitored.step(numbers(1))
    monitored.validation(1, float("nan"), 0.0, None)
    monitored.close()
    assert "NaN" not in (tmp_path / "curve.jsonl").read_text()
    [[point]] = [read_curve(tmp_path / "curve.jsonl")[1]]
    assert math.isnan(point["loss"]) and point["accuracy"] == 0.0


def test_a_validation_names_the_character_error_rate(tmp_path, capsys):
    monitored = monitor(tmp_path)
    monitored.step(numbers(1))
    monitored.validation(1, 0.75, 0.625, Samples(None, SAMPLES.texts, cer=0.125))
    monitored.close()
    assert "dev accuracy 0.625, CER 12.5 % on 2 dev utterances" in capsys.readouterr().out
    assert read_curve(tmp_path / "curve.jsonl")[1] == [
        {"step": 1, "loss": 0.75, "accuracy": 0.625, "cer": 0.125}
    ]
    write_page(tmp_path, load_recipe("demo"), [])
    page = (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert "Character error rate of some dev utterances" in page and "Word error rate" not in page


def test_an_incomplete_last_line_is_skipped(tmp_path):
    train(tmp_path)
    with open(tmp_path / "curve.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert len(read_curve(tmp_path / "curve.jsonl")[0]) == 4


def test_tensorboards_files_have_the_numbers_and_mark_where_a_resumed_run_replaces_them(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    train(tmp_path)
    monitored = monitor(tmp_path, done=2)
    monitored.step(numbers(3))
    monitored.step(numbers(4))
    monitored.close()
    values_by_tag, purged = {}, []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        content, offset = file.read_bytes(), 0
        while offset < len(content):
            size = int.from_bytes(content[offset : offset + 8], "little")
            event = Event.FromString(content[offset + 12 : offset + 12 + size])
            offset += 12 + size + 4
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                values_by_tag.setdefault(value.tag, []).append((event.step, round(value.simple_value, 4)))
    assert values_by_tag["train/loss"][:2] == [(1, 3.0), (2, 1.5)] and values_by_tag["dev/wer"] == [(4, 0.25)]
    assert (
        values_by_tag["train/learning_rate"][0] == (1, 1e-4)
        and {"train/padding", "train/audio_hours_per_hour", "train/memory", "train/share_of_peak"}
        <= values_by_tag.keys()
    )
    assert "dev/samples/text_summary" in values_by_tag and purged == [3]


@pytest.mark.slow
def test_wandb_writes_a_run_and_mlflow_gets_the_numbers_also_after_a_resumption(tmp_path, monkeypatch):
    mlflow = pytest.importorskip(
        "mlflow",
        reason="needs mlflow-skinny and wandb (the optional extra `trackers`, which is not in the lock file)",
    )
    pytest.importorskip(
        "wandb",
        reason="needs mlflow-skinny and wandb (the optional extra `trackers`, which is not in the lock file)",
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "t"
    folder.mkdir()
    train(folder, trackers=["wandb"])
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    other = tmp_path / "o"
    other.mkdir()
    train(other, trackers=["mlflow"])
    # Another machine has a folder of the same path, and nothing in it.
    shutil.rmtree(other)
    other.mkdir()
    monitored = monitor(other, done=4, total=6, trackers=["mlflow"])
    monitored.step(numbers(5))
    monitored.step(numbers(6))
    monitored.close()
    [run] = mlflow.search_runs(output_format="list")
    assert run.data.metrics["train.loss"] == 0.5 and run.data.metrics["dev.wer"] == 0.25
    assert run.data.params["training.log_every"] == "2"


def test_a_tracker_that_is_not_installed_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"asks for wandb, whose package is not installed here: run `pip install wandb`"
    ):
        trackers.require_trackers(["wandb"])
    with pytest.raises(UserError, match=r"knows mlflow and wandb, not wandbb; did you mean wandb\?"):
        load_recipe("demo", {"training.trackers": ["wandbb"]})


def test_a_failing_tracker_is_reported_once_and_training_continues(capsys):
    class Failing:
        def log(self, step: int, numbers: dict[str, float]) -> None:
            raise ConnectionError("nobody there")

    guarded = trackers.Tracker("mlflow", Failing)
    for step in range(3):
        guarded.log(step, {})
    assert (
        capsys.readouterr().out.count(
            "warning: mlflow failed (ConnectionError: nobody there); training continues without it"
        )
        == 1
    )


@pytest.mark.parametrize("name", ["mlflow", "wandb", "TensorBoard"])
def test_a_tracker_that_cannot_be_created_is_reported_once_and_training_continues(
    name, tmp_path, monkeypatch, capsys
):
    def unreachable(module: str) -> None:
        raise ConnectionError("nobody there:\n  try later")

    if name == "TensorBoard":
        (tmp_path / trackers.EVENTS).write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(trackers.importlib, "import_module", unreachable)
    train(tmp_path, trackers=[] if name == "TensorBoard" else [name])
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1
    assert f"warning: {name} failed (" in printed and "training continues without it" in printed
    assert name == "TensorBoard" or "(ConnectionError: nobody there: try later)" in printed
    assert sum('"loss"' in line for line in (tmp_path / "curve.jsonl").read_text().splitlines()) == 5


def test_the_page_is_redrawn_during_training(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "REFRESH", 0.0)
    monitored = monitor(tmp_path)
    monitored.step(numbers(1))
    monitored.page.close()
    first = (tmp_path / "curves.html").read_text()
    monitored.step(numbers(2))
    monitored.close()
    assert "so far" in first and (tmp_path / "curves.html").read_text() != first


def test_the_beginning_has_lines_and_points_of_its_own_and_no_plateau(tmp_path, capsys):
    monitored = monitor(tmp_path, total=3003, phase="beginning")
    for step in range(1, 3001):
        monitored.step(numbers(step, loss=2.0, accuracy=0.3))
    monitored.validation(3000, 1.5, 0.25, SAMPLES)
    monitored.enter("main", 4e9, None, 3003, 3003)
    for step in range(3001, 3004):
        monitored.step(numbers(step, loss=4.0, accuracy=0.4))
    monitored.close()
    log = capsys.readouterr().out
    assert "plateau" not in log
    assert "step 2/3003, epoch 1: CTC loss 2.0000, token error rate 0.700, learning rate" in log
    assert "step 3000: dev CTC loss 1.5000, dev token error rate 0.750, WER 25.0 % on 2" in log
    assert "step 3002/3003, epoch 1: loss 4.0000, accuracy 0.400" in log
    assert [row["step"] for row in read_curve(tmp_path / "curve.jsonl")[0]] == [3001, 3002, 3003]
    begun, begun_dev = read_curve(tmp_path / "curve.jsonl", "beginning")
    assert len(begun) == 3000 and begun_dev[0]["accuracy"] == 0.25
    shown = write_page(tmp_path, load_recipe("demo"), [])
    assert shown["curve"][0]["loss"] == 4.0 and shown["beginning"]["curve"][-1]["step"] == 3000
    page = (tmp_path / "curves.html").read_text("utf-8")
    assert "3,003, 3,000 of them in the beginning" in page and "Beginning: 2.000 at step" in page
    # After a beginning too, a plateau of the main phase is reported, even if training was restarted.
    resumed = monitor(tmp_path, total=9000, done=3003)
    for step in range(3004, 4200):
        resumed.step(numbers(step, accuracy=0.4))
    resumed.close()
    assert "plateau: the accuracy has been about 0.40 for 1,000 steps" in capsys.readouterr().out
