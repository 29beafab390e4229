"""When a stage or the server is killed at any moment of its start, all processes that it started end too."""

import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.build_manifest import build_manifest

SOAK = bool(os.environ.get("SLAM_ASR_SOAK"))
KILLS = 60
"""Kills of each stage in the soak."""
STARTUP = 30.0
"""A stage is killed before it and its processes have used this many seconds of CPU time. Imports take most of
that time. The limit is not in seconds of the clock, because on a busy machine a start takes minutes."""
IDLE = 10.0
"""A start is over when the stage uses less than 0.2 s of CPU time in this many seconds."""
TOKEN = "SLAM_ASR_TEST_TOKEN"
"""Environment variable by which the stage's processes are found: all of them inherit it."""
WITHIN = 30.0
"""Seconds in which the processes must end. A process that has just started may notice the kill late."""
WORKERS = {
    "train": "slam_asr.training.loop",
    "extract-features": "slam_asr.features.extraction",
    "decode": "slam_asr.decoding.decoder",
}
"""Stages that start processes, and the module that these processes run."""


@pytest.fixture(scope="module")
def arguments(tiny_recipe, tiny_corpus, model, tmp_path_factory) -> dict[str, list[str]]:
    """The arguments of each stage, except --output, for two processes."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = load_recipe(str(tiny_recipe))
    manifests = build_manifest(recipe, str(tiny_corpus), str(folder / "m")).folder
    train = ["--train-manifest", f"{manifests}/train.jsonl", "--features.cache", "none"]
    steps = ["--training.max_steps", "100000", "--training.epochs", "100000"]
    return {
        "train": ["--recipe", str(tiny_recipe), *train, *steps, "--training.processes", "2"],
        "extract-features": [
            *("--recipe", str(tiny_recipe), "--manifests", manifests),
            *("--features.processes", "2", "--features.shard_megabytes", "1", "--features.dtype", "fp32"),
            *("--encoder.frames", "all"),
        ],
        "decode": [
            *("--recipe", str(tiny_recipe), "--model", model, "--manifests", manifests),
            *("--decoding.processes", "2", "--decoding.positions_per_batch", "100"),
        ],
        "serve": ["--model", model, "--port", "0"],
    }


def start(stage: str, arguments: list[str], folder: Path, token: str) -> subprocess.Popen:
    output = [] if stage == "serve" else ["--output", str(folder / "out")]
    return subprocess.Popen(
        [sys.executable, "-m", "slam_asr", stage, *arguments, *output],
        env=os.environ | {TOKEN: token},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processes_with(token: str, module: str = "") -> list[psutil.Process]:
    """Return the running processes of a stage; if `module` is given, only those that run this module."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TOKEN) == token:
                found += [process] * (not module or module in process.cmdline())
        except psutil.Error:  # the process has ended meanwhile, or belongs to another user
            continue
    return found


def require_end(token: str, what: str) -> float:
    """Wait until no process of a stage runs any more; return the seconds that this took."""
    began = time.monotonic()
    deadline = began + WITHIN
    while left := processes_with(token):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            pytest.fail(f"{what}: still running: {left}")
        time.sleep(0.1)
    return time.monotonic() - began


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time that a process and all processes below it have used."""
    used = 0.0
    try:
        for member in (process, *process.children(recursive=True)):
            used += sum(member.cpu_times()[:2])
    except psutil.Error:  # one of them has ended meanwhile
        pass
    return used


def kill_once(stage: str, arguments: list[str], folder: Path) -> tuple[int, float]:
    """Kill a stage at a random moment of its start.

    Returns:
        The number of processes at that moment, and the seconds until none was left.
    """
    token, moment = uuid.uuid4().hex, random.uniform(0.0, STARTUP)
    killed = start(stage, arguments, folder, token)
    first, used, changed, noted = psutil.Process(killed.pid), 0.0, time.monotonic(), 0.0
    # A server that waits for requests uses hardly any CPU time.
    while killed.poll() is None and used < moment and time.monotonic() - changed < IDLE:
        time.sleep(0.1)
        used = cpu_seconds(first)
        if used - noted >= 0.2:
            noted, changed = used, time.monotonic()
    processes = len(processes_with(token))
    killed.kill()
    killed.wait()
    return processes, require_end(token, f"{stage}, killed after {moment:.2f} s of CPU time")


@pytest.mark.slow
@pytest.mark.cold
@pytest.mark.parametrize("stage", WORKERS if SOAK else ["train"])
def test_no_process_is_left_when_a_stage_is_killed_while_its_processes_start(stage, arguments, tmp_path):
    """The stage is killed while its processes start, and before or while they import torch."""
    token = uuid.uuid4().hex
    killed = start(stage, arguments[stage], tmp_path, token)
    # Imports take seconds, so a check every 0.2 s suffices. More checks would slow the machine down, because
    # each one reads the state of every process.
    while killed.poll() is None and not processes_with(token, WORKERS[stage]):
        time.sleep(0.2)
    # Only the stage itself is checked: the process that it started may already have ended.
    assert killed.poll() is None, "the stage ended before it started a process"
    killed.kill()
    killed.wait()
    require_end(token, stage)


@pytest.mark.slow
@pytest.mark.cold
@pytest.mark.skipif(not SOAK, reason="takes an hour: make soak")
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("stage", [*WORKERS, "serve"])
def test_no_process_is_left_when_a_stage_is_killed_at_any_moment(stage, arguments, tmp_path):
    kills = [kill_once(stage, arguments[stage], tmp_path / str(number)) for number in range(KILLS)]
    several = sum(processes > 1 for processes, _ in kills)
    slowest = max(seconds for _, seconds in kills)
    print(f"{stage}: {KILLS} kills, {several} with further processes; all ended within {slowest:.1f} s")
