"""A program whose GPU fails starts again, a limited number of times.

A process of a stage reports such a failure by its exit code.
"""

import os
import subprocess
import sys

import pytest

from slam_asr import restart
from slam_asr.runtime import launch
from slam_asr.runtime.launch import Job, processes_of
from slam_asr.runtime.worker import failures_written_to
from tests.ranks import fork_ranks

FAILURE = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`"
PROGRAM = """
import os, sys
from slam_asr.errors import exit_on_user_error
from slam_asr import restart
restart.PAUSES = (0.0, 0.0, 0.0)
started = int(os.environ.get(restart.RESTARTS) or 0) + 1
print("start", started, *sys.argv[1:], flush=True)
with exit_on_user_error():
    if started <= int(sys.argv[1]):
        raise RuntimeError(sys.argv[2])
print("done")
"""


def run(failures: int, message: str = FAILURE) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != restart.RESTARTS}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(failures), message, "grüße"],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.cold
def test_program_starts_again_with_its_arguments_until_its_gpu_works():
    done = run(2)
    assert done.returncode == 0 and done.stdout.count("done") == 1, done.stdout + done.stderr
    assert done.stdout.count("grüße") == 3 and done.stdout.endswith("done\n")
    assert "CUDA error: unspecified launch failure. In 0 s, the program starts again (restart 2 of 3)" in (
        done.stdout
    )


@pytest.mark.cold
def test_restarts_are_limited_and_then_the_failure_is_one_sentence():
    done = run(9)
    assert done.returncode == 2 and done.stdout.count("grüße") == 4
    assert done.stderr == (
        "slam-asr: error: The GPU failed again after each restart (CUDA error: unspecified launch failure): "
        "check it with `nvidia-smi`, or take another one; the same command resumes.\n"
    )


@pytest.mark.cold
@pytest.mark.parametrize("message", ["CUDA out of memory.", "CUDA error: device-side assert triggered", "x"])
def test_other_failures_are_shown_at_once(message):
    done = run(1, message)
    assert done.returncode == 1 and done.stdout.count("grüße") == 1
    assert done.stderr.endswith(f"RuntimeError: {message}\n")


def test_a_process_reports_the_failure_of_its_gpu_by_its_exit_code(tmp_path):
    def fail(rank: int) -> None:
        with failures_written_to(tmp_path):
            raise RuntimeError(FAILURE)

    assert fork_ranks(1, tmp_path, fail) == [os.EX_TEMPFAIL]


@pytest.mark.cold
@pytest.mark.parametrize(("code", "gpu_failed"), [(os.EX_TEMPFAIL, True), (1, False)])
def test_stage_starts_again_if_the_gpu_of_one_of_its_processes_failed(monkeypatch, code, gpu_failed):
    # The module that each process runs: it ends with a code at once.
    monkeypatch.setattr(launch, "START", "tests.runtime.ending_worker")
    with pytest.raises(Exception) as raised, processes_of(str(code), Job(), 2, "nothing") as running:
        for process in running:
            process.wait()
    assert restart.is_gpu_failure(raised.value) == gpu_failed
