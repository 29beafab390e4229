"""After a failure that is usually temporary, a training run starts again by itself, but not for ever."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from slam_asr.errors import UserError
from slam_asr.runtime.worker import PARENT
from slam_asr.training import launch, loop
from slam_asr.training.job import TrainingJob
from slam_asr.training.launch import Nodes, launch_training
from slam_asr.training.loop import PEER_GONE, TEMPORARY
from tests.ranks import fork

TEMPORARY_CODE = os.EX_TEMPFAIL


def attempts_of(folder: Path, codes: list[int], checkpoints: tuple[int, ...] = ()) -> int:
    """Launch a training run whose attempts exit with these codes, and return the number of attempts."""
    (folder / "job.json").write_text(json.dumps({"codes": codes, "checkpoints": checkpoints}))
    try:
        launch_training(1, folder, Nodes(), str(folder / "checkpoints"))
    finally:
        attempts = len((folder / "attempts").read_text())
    return attempts


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAM", "tests.training.restarted_program")
    monkeypatch.setattr(launch, "PAUSES", (0.0,))


@pytest.mark.slow
def test_only_restarts_since_the_last_checkpoint_are_counted(tmp_path, capfd):
    assert attempts_of(tmp_path, [TEMPORARY_CODE, TEMPORARY_CODE, 0], checkpoints=(1,)) == 3
    lines = [line for line in capfd.readouterr().out.splitlines() if "starts again" in line]
    assert [line.partition(". ")[2] for line in lines] == [
        "In 0 s, training starts again after step 0",
        "In 0 s, training starts again after step 3",
    ]
    assert PARENT not in os.environ


@pytest.mark.slow
def test_without_a_new_checkpoint_the_restarts_are_limited(tmp_path):
    with pytest.raises(UserError, match=r"A training process ended with code 75; its own message is above\."):
        attempts_of(tmp_path, [TEMPORARY_CODE] * 3)
    assert len((tmp_path / "attempts").read_text()) == 2


def test_other_failures_end_the_training_at_once(tmp_path):
    with pytest.raises(UserError, match="ended with code 1;"):
        attempts_of(tmp_path, [1, 0])
    assert len((tmp_path / "attempts").read_text()) == 1


def test_one_of_several_machines_does_not_start_again_by_itself(tmp_path, monkeypatch):
    made = []

    def fail(*arguments):
        made.append(arguments)
        return "it failed"

    monkeypatch.setattr(launch, "_launch_once", fail)
    with pytest.raises(UserError, match=r"it failed\."):
        launch_training(1, tmp_path, Nodes(2, 0, "127.0.0.1", 1), str(tmp_path))
    assert len(made) == 1


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error\nncclSystemError: System call failed",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    ],
)
def test_failures_of_drivers_and_networks_are_temporary(message):
    assert TEMPORARY.search(message) and not PEER_GONE.search(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory",
        "CUDA error: device-side assert triggered",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: invalid device ordinal",
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
        "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    ],
)
def test_failures_that_would_recur_are_not_temporary(message):
    assert not TEMPORARY.search(message) and not PEER_GONE.search(message)


@pytest.mark.parametrize(
    ("message", "code", "line"),
    [
        ("Connection closed by peer", 75, "because another process of this training run has ended"),
        ("CUDA error: unspecified launch failure\nmore", 75, "temporary: CUDA error: unspecified launch"),
        ("shapes cannot be multiplied", 1, "RuntimeError: shapes cannot be multiplied"),
    ],
)
def test_the_exit_code_of_a_process_says_whether_its_failure_may_be_temporary(
    tmp_path, monkeypatch, capfd, message, code, line
):
    def fail(job: TrainingJob) -> int:
        raise RuntimeError(message)

    fields = dict.fromkeys((f.name for f in dataclasses.fields(TrainingJob)), "")
    (tmp_path / "job.json").write_text(json.dumps(fields | {"folder": str(tmp_path)}))
    monkeypatch.setattr(loop, "train_in_this_process", fail)
    monkeypatch.setattr(loop.sys, "argv", ["loop", str(tmp_path / "job.json")])
    monkeypatch.setenv("RANK", "1")
    assert fork(loop.main) == [code]
    assert line in "".join(capfd.readouterr())
