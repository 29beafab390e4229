"""An interrupted training run resumes from its last checkpoint, with identical losses."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import CHECKPOINTS
from slam_asr.artifacts.model_folder import read_config
from slam_asr.artifacts.stage_record import read_record
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.train import train
from slam_asr.training import resumer
from slam_asr.training.live import read_curve
from tests.faults import FaultyProxy

STEPS = 120
OPTIONS = {
    # Dropout draws random numbers in each process, so the state of the generators must be restored too.
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
FEWER = 60
"""Steps of the shorter training runs, which are not compared with the fixture `uninterrupted`."""
KILLS = 10 if os.environ.get("SLAM_ASR_SOAK") else 2


def test_a_checkpoint_beyond_the_last_step_is_refused_before_a_model_is_built(tmp_path, monkeypatch):
    folder = str(tmp_path / CHECKPOINTS)
    checkpoint.publish(
        folder, checkpoint.Checkpoint(5, 0, updates=5, engine="ddp", processes=1, inputs={}), 1
    )
    parts = SimpleNamespace(
        rank=0,
        folder=tmp_path,
        job=SimpleNamespace(published=str(tmp_path)),
        plan=SimpleNamespace(steps=3),
        recipe=load_recipe("demo"),
    )
    for enter in ("enter_beginning", "enter_main"):
        monkeypatch.setattr(resumer, enter, lambda parts: pytest.fail("a model is built"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"step-0*5 is beyond the 3 steps of this training run"):
            resumer.Resumer(parts).resume()
    finally:
        torch.distributed.destroy_process_group()


def command(prepared, output: str, **options) -> list[str]:
    recipe, manifests, features = prepared
    arguments = [
        f"--{key}={json.dumps(value) if isinstance(value, list) else value}"
        for key, value in (OPTIONS | options).items()
    ]
    return [
        sys.executable,
        "-m",
        "slam_asr",
        "train",
        recipe,
        "--train-manifest",
        f"{manifests}/train.jsonl",
        "--dev-manifest",
        f"{manifests}/dev.jsonl",
        "--feature-store",
        features,
        "--output",
        output,
        *arguments,
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
    """Wait for the process to end, and return its output; kill it after `within` seconds."""
    try:
        return process.communicate(timeout=within)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def succeed(process: subprocess.Popen) -> None:
    """Wait for the process to end, and require that it did not fail."""
    printed = ended(process)
    assert process.returncode == 0, printed


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
        time.sleep(0.01)


def curve_of(output: Path) -> tuple[list, list]:
    training, validation = read_curve(output / "curve.jsonl")
    compared = ("step", "epoch", "loss", "accuracy", "learning_rate", "gradient_norm")
    return [[row[k] for k in compared] for row in training], validation


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """The curves of a training run in two processes that is not interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "t"
    process = start(prepared, output, **{"training.processes": 2})
    printed = ended(process)
    assert process.returncode == 0, printed
    training, validation = curve_of(output)
    assert len(training) == STEPS and [v["step"] for v in validation] == [25, 50, 75, 100, STEPS]
    assert len({row[2] for row in training}) > STEPS // 2, (
        "the losses hardly change: equal curves would prove nothing"
    )
    return training, validation


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "slam_asr.training.loop" in p.cmdline()
    ]


@pytest.mark.slow
def test_losses_after_kills_at_random_steps_equal_those_of_an_uninterrupted_run(
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
    assert re.search(r"resuming after step \d+ of 120", printed)
    assert curve_of(output) == uninterrupted
    retained = [f.name for f in (output / "checkpoints").iterdir() if f.is_dir()]
    assert len(retained) <= 3 and f"step-{STEPS:08d}" in retained
    assert not list((output / "checkpoints").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"training.zero_stage": 3, "training.precision": "bf16"}, {"training.engine": "fsdp"}],
    ids=["zero-3-bf16", "fsdp"],
)
def test_sigterm_leaves_a_checkpoint_and_the_same_command_resumes(prepared, tmp_path, options):
    options = {
        "training.processes": 2,
        "training.max_steps": FEWER,
        "training.checkpoint_every": 0,
        **options,
    }
    reference, output = tmp_path / "reference", tmp_path / "t"
    succeed(start(prepared, reference, **options))
    process = start(prepared, output, **options)
    wait_for_step(process, output, 15)
    process.send_signal(signal.SIGTERM)
    printed = ended(process)
    assert process.returncode == 143, printed
    found = checkpoint.require(str(output / "checkpoints"))
    assert 15 <= found.step < FEWER
    assert (
        f"stopped by SIGTERM after step {found.step}" in printed
        and "run the same command again to resume" in printed
    )
    assert "Traceback" not in printed and read_record(output) is None
    # The saved checkpoint can be converted, and tried, before the training run is finished.
    model = convert_checkpoint(str(output), str(tmp_path / "model"))
    assert read_config(model.folder).training["steps"] == found.step
    process = start(prepared, output, **options)
    printed = ended(process)
    assert process.returncode == 0 and f"resuming after step {found.step} of {FEWER}" in printed
    assert curve_of(output) == curve_of(reference)


@pytest.mark.slow
@pytest.mark.cold
def test_a_killed_process_ends_the_training_with_a_message(prepared, tmp_path):
    process = start(prepared, tmp_path / "t", **{"training.processes": 2, "training.max_steps": 5000})
    wait_for_step(process, tmp_path / "t", 10)
    started = time.monotonic()
    workers_of(process)[1].kill()
    printed = ended(process, within=60)
    assert process.returncode == 2 and time.monotonic() - started < 40
    assert (
        "A training process was killed (signal 9), usually because the machine ran out of memory" in printed
    )
    assert "Traceback" not in printed, printed


@pytest.mark.slow
def test_another_number_of_processes_resumes_in_the_same_order(prepared, tmp_path):
    """Dropout is off, because each process draws random numbers of its own."""
    options = {"llm.lora.dropout": 0.0, "training.checkpoint_every": 0, "training.max_steps": FEWER}
    one, output = tmp_path / "one", tmp_path / "t"
    succeed(start(prepared, one, **options, **{"training.processes": 1}))
    process = start(prepared, output, **options, **{"training.processes": 2, "training.zero_stage": 2})
    wait_for_step(process, output, 20)
    process.send_signal(signal.SIGTERM)
    ended(process)
    process = start(prepared, output, **options, **{"training.processes": 1, "training.engine": "ddp"})
    printed = ended(process)
    assert process.returncode == 0 and "resuming after step" in printed
    for ours, theirs in zip(curve_of(output)[0], curve_of(one)[0], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


@pytest.mark.slow
def test_checkpoints_reach_object_storage_that_fails_now_and_then(
    prepared, uninterrupted, faulty_s3, monkeypatch, tmp_path
):
    """After a kill and the loss of its disk, a training run resumes from object storage."""
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
    assert process.returncode == 0 and "resuming after step" in printed, printed
    record = read_record("s3://bucket/t")
    training, validation = read_curve(record.file("curve.jsonl"))
    assert [row["loss"] for row in training] == [
        row[2] for row in uninterrupted[0]
    ] and validation == uninterrupted[1]
    assert convert_checkpoint("s3://bucket/t", str(tmp_path / "model")).metrics["parameters"] > 0
    assert faulty_s3.faults.total() > 0


@pytest.mark.slow
def test_storage_that_is_unavailable_for_a_while_does_not_stop_training(
    prepared, bucket, s3_server, monkeypatch
):
    """The write of a checkpoint is repeated while training continues."""
    seconds = 120 if os.environ.get("SLAM_ASR_SOAK") else 6
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", str(10 * seconds))
    first = []

    def unavailable(request) -> str | None:
        if request.method != "PUT" or "/checkpoints/step-" not in request.target:
            return None
        first.append(time.monotonic())
        return "busy" if time.monotonic() < first[0] + seconds else None

    with FaultyProxy(s3_server, rule=unavailable) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        # The training run is long enough to be still running when the storage is back.
        steps = {"training.max_steps": 150 * seconds, "training.epochs": 10**6}
        process = start(prepared, "s3://bucket/t", **{"training.checkpoint_every": 5, **steps})
        printed = ended(process, within=120 + 4 * seconds)
    assert process.returncode == 0, printed
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert (
        proxy.faults["busy"] > 1
        and checkpoint.require("s3://bucket/t/checkpoints").step
        == read_record("s3://bucket/t").facts["steps"]
    )


@pytest.mark.slow
def test_training_stops_when_no_checkpoint_can_be_uploaded_and_resumes_from_the_local_copy(
    prepared, bucket, s3_server, monkeypatch
):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "1")
    endless = {"training.max_steps": 10**6, "training.epochs": 10**6, "training.checkpoint_every": 4}

    def denied(request):
        return (403, "AccessDenied") if request.method == "PUT" and "/step-" in request.target else None

    with FaultyProxy(s3_server, rule=denied) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.address)
        process = start(prepared, "s3://bucket/t", **endless)
        printed = ended(process)
    assert process.returncode == 2, printed
    error = re.search(
        r"slam-asr: error: The checkpoint of step \d+ could not be written: .*: access is denied.*; "
        r"the weights are in (\S+)/step-(\d+), and there is no earlier checkpoint: make \S+ writable, "
        r"and run the same command again on this machine, which then uploads them and resumes\.\n",
        printed,
    )
    assert error, printed
    assert checkpoint.require(error[1]).step == int(error[2])
    process = start(prepared, "s3://bucket/t", **endless)
    for line in process.stdout:
        if "resuming after step" in line:
            process.send_signal(signal.SIGTERM)
            break
    ended(process)
    assert f"resuming after step {int(error[2])} of" in line and process.returncode == 143
    assert checkpoint.require("s3://bucket/t/checkpoints").step >= int(error[2])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused(prepared, tmp_path):
    output = tmp_path / "t"
    succeed(start(prepared, output, **{"training.max_steps": 14}))
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
def test_training_ends_early_if_the_dev_loss_no_longer_falls(prepared, tmp_path):
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
    latest, best_model = (
        convert_checkpoint(record.folder, str(tmp_path / which), which=which) for which in ("latest", "best")
    )
    assert (
        latest.file("projector.safetensors").read_bytes()
        != best_model.file("projector.safetensors").read_bytes()
    )
