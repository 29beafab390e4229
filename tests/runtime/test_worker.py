"""A worker process always ends, and never outlives its stage, whenever the stage is killed."""

import atexit
import os
import subprocess
import sys
import time

import pytest

from slam_asr.errors import UserError
from slam_asr.runtime import launch
from slam_asr.runtime.launch import Job, processes_of
from slam_asr.runtime.worker import FAILURE, PARENT, failures_written_to, leave_group
from tests.ranks import fork_ranks

WORKER = "from slam_asr.runtime.worker import die_with_parent; die_with_parent(); print('works', flush=True)"


def test_worker_whose_parent_is_gone_ends_at_once():
    # The process that PARENT names has ended, like a stage that was killed while its worker was starting.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    worker = subprocess.run(
        [sys.executable, "-c", WORKER], env=os.environ | {PARENT: str(ended.pid)}, capture_output=True
    )
    assert (worker.returncode, worker.stdout) == (2, b"")


def test_worker_of_a_running_parent_works():
    for environment in ({PARENT: str(os.getpid())}, {}):
        worker = subprocess.run(
            [sys.executable, "-c", WORKER], env=os.environ | environment, capture_output=True
        )
        assert (worker.returncode, worker.stdout) == (0, b"works\n")


def test_worker_dies_with_a_parent_that_is_killed_at_any_moment_of_its_start():
    stage = (
        "import os, subprocess, sys, time\n"
        f"worker = {WORKER + '; import time; time.sleep(60)'!r}\n"
        f"environment = os.environ | {{{PARENT!r}: str(os.getpid())}}\n"
        "process = subprocess.Popen([sys.executable, '-c', worker], env=environment)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    for seconds in (0.0, 0.02, 0.1, 0.4):
        killed = subprocess.Popen([sys.executable, "-c", stage], stdout=subprocess.PIPE, text=True)
        worker = int(killed.stdout.readline())
        time.sleep(seconds)
        killed.kill()
        killed.wait()
        deadline = time.monotonic() + 20
        while _runs(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(worker), (
            f"the worker still runs after its parent was killed {seconds} s after its start"
        )
        killed.stdout.close()


def _runs(process: int) -> bool:
    """Whether a process exists and has not ended. A zombie, which nobody waits for, has ended."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_leaves_its_group_although_another_is_gone_and_the_group_cannot_be_destroyed(tmp_path):
    import torch

    def leave(rank: int) -> None:
        torch.distributed.barrier()
        if rank == 1:
            os._exit(3)
        # The real function has hung like this after another process had closed its connections.
        torch.distributed.destroy_process_group = lambda: time.sleep(1e6)
        leave_group(5)

    assert fork_ranks(2, tmp_path, leave) == [5, 3]


def test_a_process_waits_for_the_others_before_it_leaves(tmp_path):
    def leave(rank: int) -> None:
        if rank == 1:
            time.sleep(0.3)
            (tmp_path / "done").touch()
        atexit.register(lambda: (tmp_path / "done").exists() or os._exit(4))
        leave_group()

    assert fork_ranks(2, tmp_path, leave) == [0, 0]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the message"), 2, "the message"),
        (OSError(28, "No space left on device", "/full"), 2, "The disk is full"),
        (OSError(5, "Input/output error"), 1, None),
        (ValueError("a defect"), 1, None),
    ],
)
def test_a_failing_process_ends_at_once_and_skips_the_interpreters_finalisation(
    tmp_path, error, code, message
):
    def fail(rank: int) -> None:
        try:
            with failures_written_to(tmp_path):
                raise error
        finally:
            (tmp_path / "continued").touch()

    assert fork_ranks(1, tmp_path, fail) == [code]
    assert (tmp_path / FAILURE).exists() == (message is not None)
    assert not (tmp_path / "continued").exists()
    assert message is None or (tmp_path / FAILURE).read_text().startswith(message)


@pytest.mark.cold
def test_a_process_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    with processes_of("tests.runtime.stubborn_worker", Job(), 2, "nothing", piped=True) as running:
        assert [process.stdout.readline() for process in running] == ["ignores SIGTERM\n"] * 2
    assert [process.returncode for process in running] == [-9, -9]
