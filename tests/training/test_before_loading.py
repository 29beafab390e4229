"""Before a process is started, a training run that this machine cannot run is refused in one sentence."""

import importlib.util

import pytest
import torch

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.config.recipe import Training, load_recipe
from slam_asr.errors import UserError
from slam_asr.runtime import machine
from slam_asr.stages import train as stage
from slam_asr.training import kernels, launch
from slam_asr.training.inputs import warn_of_shared_utterances


class Started(Exception):
    """Raised instead of starting the training processes."""


@pytest.fixture
def start_training(prepared, monkeypatch, tmp_path):
    """Return a function that trains with changes to the recipe, up to the start of the processes."""
    recipe, manifests, features = prepared

    def start(*_) -> None:
        raise Started

    monkeypatch.setattr(launch, "launch_training", start)

    def run(**options) -> None:
        changed = load_recipe(recipe, {f"training.{key}": value for key, value in options.items()})
        stage.train(changed, f"{manifests}/train.jsonl", str(tmp_path / "t"), features)

    return run


def test_too_little_memory_is_refused(start_training, monkeypatch):
    with pytest.raises(Started):
        start_training()
    monkeypatch.setattr(machine, "host_memory", lambda: 1e5)
    with pytest.raises(
        UserError, match=r"^This training run needs about .+ and this host has 0\.0001 GB available: [^\n]+$"
    ):
        start_training()


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Pretend that the machine has no GPU."""
    monkeypatch.setattr("slam_asr.training.inputs.pick_device", lambda: torch.device("cpu"))


def test_compiling_without_a_compiler_is_refused(start_training, on_a_cpu, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^training\.compile needs a C\+\+ compiler, and g\+\+ is not installed: [^\n]+$"
    ):
        start_training(compile=True)
    (tmp_path / "my-compiler").touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"^training\.compile needs Python's headers"):
        start_training(compile=True)
    (tmp_path / "Python.h").touch()
    with pytest.raises(Started):
        start_training(compile=True)


def test_ligers_kernels_without_a_gpu_are_refused(start_training, on_a_cpu):
    with pytest.raises(UserError, match=r"^training\.liger needs a GPU"):
        start_training(liger=True)


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is not None,
    reason="tests machines without the package liger-kernel",
)
def test_ligers_kernels_without_the_package_are_refused():
    with pytest.raises(UserError, match=r"pip install liger-kernel"):
        kernels.require_kernels(Training(liger=True), torch.device("cuda"))


def test_dev_utterances_that_are_also_in_train_are_counted(prepared, capsys):
    _, manifests, _ = prepared
    trained, dev = read_manifest(f"{manifests}/train.jsonl"), read_manifest(f"{manifests}/dev.jsonl")
    warn_of_shared_utterances({"train": trained, "dev": dev})
    assert capsys.readouterr().out == ""
    warn_of_shared_utterances({"train": trained, "dev": [*dev, *trained[:2]]})
    assert (
        f"warning: 2 of {len(dev) + 2} dev utterances are also in train (first {trained[0].key})"
        in capsys.readouterr().out
    )
