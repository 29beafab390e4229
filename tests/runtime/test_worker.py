"""A worker process never outlives the stage that started it, whenever that stage is killed."""

import os
import subprocess
import sys
import time

from slam_asr.runtime.worker import PARENT

WORKER = "from slam_asr.runtime.worker import die_with_parent; die_with_parent(); print('works', flush=True)"


def test_worker_whose_parent_is_gone_ends_at_once():
    # The process that PARENT names has ended, as a stage that was killed while its worker was importing.
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
    """Whether a process exists and has not ended. One without a parent may remain as a zombie."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
