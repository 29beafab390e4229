"""A program starts itself again, once, if malloc would not request huge pages."""

import subprocess
import sys

import pytest

from slam_asr.runtime import environment
from slam_asr.runtime.environment import HUGE_PAGES, TUNABLES, huge_pages


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("always [madvise] never", None, f"{HUGE_PAGES}=1"),
        ("always [madvise] never", "glibc.malloc.check=3", f"glibc.malloc.check=3:{HUGE_PAGES}=1"),
        ("always [madvise] never", f"{HUGE_PAGES}=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_huge_pages_are_requested_only_if_that_has_an_effect(tmp_path, monkeypatch, mode, given, expected):
    kernel = tmp_path / "enabled"
    if mode is not None:
        kernel.write_text(mode + "\n")
    monkeypatch.setattr(environment, "_KERNELS_MODE", kernel)
    monkeypatch.delenv(TUNABLES, raising=False)
    if given is not None:
        monkeypatch.setenv(TUNABLES, given)
    assert huge_pages() == ({} if expected is None else {TUNABLES: expected})


PROGRAM = """
import os, sys
from pathlib import Path
from slam_asr.runtime import environment
environment._KERNELS_MODE = Path(sys.argv[1])
print("started with", os.environ.get("GLIBC_TUNABLES"), flush=True)
environment.prepare_environment()
print("runs with", *sys.argv[2:])
"""


def test_a_program_starts_again_once_with_the_same_arguments(tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.delenv(TUNABLES, raising=False)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "enabled"), "a b", "c"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "started with None",
        f"started with {HUGE_PAGES}=1",
        "runs with a b c",
    ]
