"""A training that is killed, stopped or starved goes on from its last checkpoint, with the very losses it would have had."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slam_asr.conversion.convert import convert_checkpoint
from slam_asr.errors import UserError
from slam_asr.recipe import load_recipe
from slam_asr.stage import read_record
from slam_asr.training import checkpoint
from slam_asr.training.live import read_curve
from slam_asr.training.train import require_same_training, train
from tests.faults import FaultyProxy

STEPS = 120
OPTIONS = {
    # Dropout draws random numbers in each process, so that their state matters too.
    "llm.tuning": "lora",
    "llm.lora.dropout": 0.2,
    "training.epochs": 1000,
    "training.max_steps": STEPS,
    "training.positions_per_step": 100,
    "training.positions_per_batch": 50,
    "training.validate_every": 25,
    "training.checkpoint_every": 7,
    "training.learning_rate": 1e-3,
    "training.gradient_clipping": 1.0,
    "training.schedule": "cosine",
}
KILLS = 10 if os.environ.get("SLAM_ASR_SOAK") else 2


def command(prepared, output: str, **options) -> list[str]:
    recipe, manifests, features = prepared
    given = [
        f"--{key}={json.dumps(value) if isinstance(value, list) else value}"
        for key, value in (OPTIONS | options).items()
    ]
    return [
        sys.executable,
        "-m",
        "slam_asr",
        "train",
        recipe,
        "--train_manifest",
        f"{manifests}/train.jsonl",
        "--dev_manifest",
        f"{manifests}/dev.jsonl",
        "--feature_store",
        features,
        "--output",
        output,
        *given,
    ]


def start(prepared, output: str | Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command(prepared, str(output), **options),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen, within: float = 120) -> str:
    """What it printed, once it has ended by itself."""
    try:
        return process.communicate(timeout=within)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    curve = output / "curve.jsonl"
    until = time.monotonic() + 120
    while (
        not curve.is_file()
        or sum('"loss"' in line and "validation" not in line for line in curve.read_text().splitlines())
        < step
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.002)


def curve_of(output: Path) -> tuple[list, list]:
    training, validation = read_curve(output / "curve.jsonl")
    kept = ("step", "epoch", "loss", "accuracy", "learning_rate", "gradient_norm")
    return [[row[k] for k in kept] for row in training], validation


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """The curves of two processes that nobody stops."""
    output = tmp_path_factory.mktemp("uninterrupted") / "t"
    process = start(prepared, output, **{"training.processes": 2})
    assert process.returncode in (None, 0), ended(process)
    printed = ended(process)
    assert process.returncode == 0, printed
    training, validation = curve_of(output)
    assert len(training) == STEPS and [v["step"] for v in validation] == [25, 50, 75, 100, STEPS]
    assert len({row[2] for row in training}) > STEPS // 2, (
        "the losses hardly move: equal curves would say nothing"
    )
    return training, validation


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "slam_asr.training.loop" in p.cmdline()
    ]


@pytest.mark.slow
def test_killed_at_random_steps_the_losses_are_those_of_an_uninterrupted_run(
    prepared, uninterrupted, tmp_path
):
    output = tmp_path / "t"
    draw = random.Random(0 if KILLS == 2 else None)
    for step in sorted(draw.sample(range(3, STEPS - 40), KILLS)):
        process = start(prepared, output, **{"training.processes": 2})
        wait_for_step(process, output, step)
        process.kill()
        ended(process)
    process = start(prepared, output, **{"training.processes": 2})
    printed = ended(process)
    assert process.returncode == 0, printed
    assert re.search(r"going on behind step \d+ of 120", printed)
    assert curve_of(output) == uninterrupted
    kept = [f.name for f in (output / "checkpoints").iterdir() if f.is_dir()]
    assert len(kept) <= 3 and f"step-{STEPS:08d}" in kept
    assert not list((output / "checkpoints").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"training.zero_stage": 3, "training.precision": "bf16"}, {"training.engine": "fsdp"}],
    ids=["zero-3-bf16", "fsdp"],
)
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(prepared, tmp_path, options):
    options = {"training.processes": 2, "training.checkpoint_every": 0, **options}
    whole, output = tmp_path / "whole", tmp_path / "t"
    process = start(prepared, whole, **options)
    assert process.wait() == 0 or ended(process)
    process = start(prepared, output, **options)
    wait_for_step(process, output, 30)
    process.send_signal(signal.SIGTERM)
    printed = ended(process)
    assert process.returncode == 143, printed
    found = checkpoint.require(str(output / "checkpoints"))
    assert 30 <= found.step < STEPS
    assert (
        f"stopped by SIGTERM behind step {found.step}" in printed
        and "run the same command again to go on" in printed
    )
    assert "Traceback" not in printed and read_record(output) is None
    process = start(prepared, output, **options)
    printed = ended(process)
    assert process.returncode == 0 and f"going on behind step {found.step} of {STEPS}" in printed
    assert curve_of(output) == curve_of(whole)


@pytest.mark.slow
@pytest.mark.cold
def test_one_process_that_dies_ends_the_job_with_a_message(prepared, tmp_path):
    process = start(prepared, tmp_path / "t", **{"training.processes": 2, "training.max_steps": 5000})
    wait_for_step(process, tmp_path / "t", 10)
    started = time.monotonic()
    workers_of(process)[1].kill()
    printed = ended(process, within=60)
    assert process.returncode == 2 and time.monotonic() - started < 40
    assert "A training process was killed (signal 9), most often for want of memory" in printed
    assert "Traceback" not in printed, printed


@pytest.mark.slow
def test_another_number_of_processes_goes_on_in_the_same_order(prepared, uninterrupted, tmp_path):
    """Without dropout, whose random numbers are each process' own."""
    options = {"llm.lora.dropout": 0.0, "training.checkpoint_every": 0}
    one, output = tmp_path / "one", tmp_path / "t"
    process = start(prepared, one, **options, **{"training.processes": 1})
    assert process.wait() == 0 or ended(process)
    process = start(prepared, output, **options, **{"training.processes": 2, "training.zero_stage": 2})
    wait_for_step(process, output, 40)
    process.send_signal(signal.SIGTERM)
    ended(process)
    process = start(prepared, output, **options, **{"training.processes": 1, "training.engine": "ddp"})
    printed = ended(process)
    assert process.returncode == 0 and "going on behind step" in printed
    for ours, theirs in zip(curve_of(output)[0], curve_of(one)[0], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


@pytest.mark.slow
def test_checkpoints_go_to_object_storage_while_it_fails_now_and_then(
    prepared, uninterrupted, faulty_s3, monkeypatch, tmp_path
):
    """Killed and with its disk lost, the training goes on from what object storage has."""
    options = {"training.processes": 2, "training.checkpoint_every": 20}
    process = start(prepared, "s3://bucket/t", **options)
    until = time.monotonic() + 120
    while checkpoint.find("s3://bucket/t/checkpoints") is None:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.kill()
    ended(process)
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "another-disk"))
    process = start(prepared, "s3://bucket/t", **options)
    printed = ended(process)
    assert process.returncode == 0 and "going on behind step" in printed, printed
    record = read_record("s3://bucket/t")
    training, validation = read_curve(record.file("curve.jsonl"))
    assert [row["loss"] for row in training] == [
        row[2] for row in uninterrupted[0]
    ] and validation == uninterrupted[1]
    assert convert_checkpoint("s3://bucket/t", str(tmp_path / "model")).metrics["parameters"] > 0
    assert faulty_s3.faults.total() > 0


@pytest.mark.slow
def test_storage_that_is_away_for_a_while_does_not_stop_training(prepared, bucket, s3_server, monkeypatch):
    """Checkpoints that cannot be written are said, and the next one is tried."""
    seconds = 120 if os.environ.get("SLAM_ASR_SOAK") else 6
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1")
    first = []

    def away(request) -> str | None:
        if request.method != "PUT" or "/checkpoints/" not in request.target:
            return None
        first.append(time.monotonic())
        return "busy" if time.monotonic() < first[0] + seconds else None

    with FaultyProxy(s3_server, rule=away) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        # Long enough to be still at it when the storage is back.
        steps = {"training.max_steps": 150 * seconds, "training.epochs": 10**6}
        process = start(prepared, "s3://bucket/t", **{"training.checkpoint_every": 5, **steps})
        printed = ended(process, within=120 + 4 * seconds)
    assert process.returncode == 0, printed
    assert re.search(r"warning: the checkpoint of step \d+ could not be written, training goes on", printed)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert (
        proxy.faults["busy"] > 1
        and checkpoint.require("s3://bucket/t/checkpoints").step
        == read_record("s3://bucket/t").facts["steps"]
    )


def test_a_checkpoint_of_another_recipe_is_refused_by_its_keys(tmp_path):
    inputs = {
        "llm_sha256": "a" * 64,
        "recipe": {
            "training": {"learning_rate": 1e-4, "max_steps": 10, "schedule": "constant", "validate_every": 5}
        },
    }
    folder = str(tmp_path)
    checkpoint.publish(folder, checkpoint.Checkpoint(3, 0, 3, "ddp", 1, inputs), keep=1)
    require_same_training(folder, inputs, overwrite=False)

    def changed(**training) -> dict:
        return inputs | {"recipe": {"training": inputs["recipe"]["training"] | training}}

    require_same_training(folder, changed(max_steps=20, validate_every=1), overwrite=False)
    with pytest.raises(
        UserError, match=r"another training \(1 keys differ: training\.learning_rate 0\.0001 → 0\.001\)"
    ):
        require_same_training(folder, changed(learning_rate=1e-3, max_steps=20), overwrite=False)
    with pytest.raises(
        UserError,
        match=r"3 keys differ: llm_sha256 aaaaaaaaaaaa… → b, training\.max_steps 10 → 20, training\.schedule constant → linear",
    ):
        require_same_training(
            folder, changed(schedule="linear", max_steps=20) | {"llm_sha256": "b"}, overwrite=False
        )
    require_same_training(folder, changed(learning_rate=1e-3), overwrite=True)
    assert checkpoint.find(folder) is None


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    folder = str(tmp_path / "c")
    for step, dev_loss in ((5, None), (10, 2.0), (15, 1.0), (20, None), (25, 1.5), (30, float("nan"))):
        about = checkpoint.Checkpoint(step, 0, step, "ddp", 1, {}, dev_loss=dev_loss)
        (tmp_path / "c" / about.name).mkdir(parents=True)
        (tmp_path / "c" / about.name / "weights-00000-of-00001.safetensors").write_bytes(b"x")
        checkpoint.publish(folder, about, keep=2)
    assert sorted(f.name for f in (tmp_path / "c").iterdir() if f.is_dir()) == [
        "step-00000015",
        "step-00000025",
        "step-00000030",
    ]
    assert checkpoint.require(folder).step == 30 and checkpoint.require(folder, "best").step == 15


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    folder = str(tmp_path)
    checkpoint.publish(folder, checkpoint.Checkpoint(5, 0, 5, "ddp", 1, {}), keep=2)
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000010" / "weights-00000-of-00002.safetensors").write_bytes(b"half")
    assert checkpoint.require(folder).step == 5
    checkpoint.publish(folder, checkpoint.Checkpoint(8, 0, 8, "ddp", 1, {}), keep=2)
    assert (tmp_path / "step-00000010").exists(), "another process may be writing it"
    checkpoint.publish(folder, checkpoint.Checkpoint(12, 0, 12, "ddp", 1, {}), keep=2)
    assert not (tmp_path / "step-00000010").exists() and (tmp_path / "step-00000008").exists()


def test_what_lies_behind_the_latest_is_forgotten_before_it_is_gone_on(tmp_path):
    folder = str(tmp_path)
    for step in (5, 9):
        checkpoint.publish(folder, checkpoint.Checkpoint(step, 0, step, "ddp", 1, {}), keep=2)
    (tmp_path / "latest").write_text("step-00000005")
    # Killed between writing a pointer's new content and giving it its name.
    (tmp_path / ".latest.2780.140456.partial").write_text("step-00000009")
    checkpoint.discard_newer_than_latest(folder)
    assert not list(tmp_path.rglob("*.partial"))
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == ["step-00000005"] and checkpoint.require(
        folder
    ).step == 5


def test_no_checkpoint_and_a_lost_one_are_said(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.require(str(tmp_path))
    (tmp_path / "latest").write_text("step-00000009")
    with pytest.raises(UserError, match="names step-00000009, which is not there or not whole"):
        checkpoint.require(str(tmp_path))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_before_it_does_harm(prepared, tmp_path):
    output = tmp_path / "t"
    process = start(prepared, output, **{"training.max_steps": 14})
    assert process.wait() == 0 or ended(process)
    found = checkpoint.require(str(output / "checkpoints"))
    file = output / "checkpoints" / found.name / "moments-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    (output / "stage.json").unlink()
    process = start(prepared, output, **{"training.max_steps": 14})
    printed = ended(process)
    assert process.returncode == 2 and "is damaged (its SHA-256 is not the one in checkpoint.json)" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_training_ends_early_where_the_dev_loss_no_longer_falls(prepared, tmp_path):
    recipe, manifests, features = prepared
    options = OPTIONS | {
        "training.validate_every": 1,
        "training.patience": 2,
        "training.learning_rate": 0.3,
        "training.warmup_steps": 0,
        "training.schedule": "constant",
    }
    record = train(
        load_recipe(recipe, options),
        f"{manifests}/train.jsonl",
        str(tmp_path / "t"),
        features,
        f"{manifests}/dev.jsonl",
    )
    losses = [v["loss"] for v in record.facts["validation"]]
    best = losses.index(min(losses))
    assert record.facts["steps"] == best + 1 + 2 < STEPS and len(losses) == record.facts["steps"]
    assert checkpoint.require(str(tmp_path / "t" / "checkpoints"), "best").step == best + 1
    latest, chosen = (
        convert_checkpoint(record.folder, str(tmp_path / which), which=which) for which in ("latest", "best")
    )
    assert (
        latest.file("projector.safetensors").read_bytes() != chosen.file("projector.safetensors").read_bytes()
    )


def test_dev_utterances_that_are_trained_on_are_counted_and_an_empty_set_is_refused(
    prepared, tmp_path, capsys
):
    from slam_asr.manifest import read_manifest
    from slam_asr.training.train import _look_at

    _, manifests, _ = prepared
    trained, dev = read_manifest(f"{manifests}/train.jsonl"), read_manifest(f"{manifests}/dev.jsonl")
    _look_at({"train": trained, "dev": dev})
    assert capsys.readouterr().out == ""
    _look_at({"train": trained, "dev": [*dev, *trained[:2]]})
    assert (
        f"warning: 2 of {len(dev) + 2} dev utterances are also in train (first {trained[0].key})"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="The dev manifest has no utterance that can be heard"):
        _look_at({"train": trained, "dev": []})
