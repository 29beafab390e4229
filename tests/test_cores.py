"""A container's CPU limit also limits the threads of its programs, in both versions of cgroups."""

import os
import subprocess
import sys

import pytest

from slam_asr import cores
from slam_asr.errors import exit_on_user_error
from slam_asr.features.audio_workers import default_workers


@pytest.fixture
def eight_cores(tmp_path, monkeypatch):
    """Imitate a machine of eight cores without limits; return the folder for the files of its cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cores, "CPU_MAX", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(cores, "CPU_CFS", (str(tmp_path / "quota"), str(tmp_path / "period")))
    for name in (*cores.THREADS, cores.LIMITED):
        # `setenv` comes first: after `delenv` alone, variables that the code sets would remain at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


LIMITS = [
    ("50000 100000\n", 1),
    ("100000 100000\n", 1),
    ("150000 100000\n", 2),
    ("300000 100000\n", 3),
    ("1600000 100000\n", 8),
    ("max 100000\n", 8),
    ("", 8),
]


@pytest.mark.parametrize(("content", "expected"), LIMITS)
def test_a_limit_of_either_version_is_rounded_up_to_cores(eight_cores, content, expected):
    (eight_cores / "cpu.max").write_text(content)
    assert cores.usable_cores() == expected
    (eight_cores / "cpu.max").unlink()
    if content:
        quota, period = content.replace("max", "-1").split()
        (eight_cores / "quota").write_text(f"{quota}\n")
        (eight_cores / "period").write_text(f"{period}\n")
    assert cores.usable_cores() == expected


def test_a_limit_is_shared_by_processes_and_by_workers_that_read_audio(eight_cores):
    assert cores.thread_limits(2) == {"OMP_NUM_THREADS": "4", "RAYON_NUM_THREADS": "4"}
    (eight_cores / "cpu.max").write_text("400000 100000")
    assert cores.thread_limits(2) == {"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2"}
    assert cores.thread_limits(16)["OMP_NUM_THREADS"] == "1"
    assert default_workers(1, on_gpu=True) == 3


def test_only_a_limit_below_the_cores_changes_the_threads_and_a_users_own_value_remains(
    eight_cores, monkeypatch
):
    cores.limit_threads()
    assert not set(cores.THREADS) & set(os.environ)
    (eight_cores / "cpu.max").write_text("200000 100000")
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    cores.limit_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["RAYON_NUM_THREADS"]) == ("2", "7")
    # A limit that this process set is not the user's, so each of two processes gets half of it.
    assert cores.thread_limits(2) == {"OMP_NUM_THREADS": "1"}


def test_every_program_begins_with_the_limit(eight_cores):
    (eight_cores / "cpu.max").write_text("200000 100000")
    with exit_on_user_error():
        assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_command_line_loads_torch_only_after_the_threads_are_limited():
    code = "import sys, slam_asr.cli; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
