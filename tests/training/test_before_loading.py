"""What a training cannot do here is one sentence, before a process is started."""

import importlib.util

import pytest
import torch

from slam_asr.errors import UserError
from slam_asr.planning import memory_fit
from slam_asr.recipe import Training, load_recipe
from slam_asr.training import kernels
from slam_asr.training import train as stage


class Started(Exception):
    """The first process would have been started."""


@pytest.fixture
def begin(prepared, monkeypatch, tmp_path):
    """Begin to train with changes to the recipe."""
    recipe, manifests, features = prepared

    def start(*_) -> None:
        raise Started

    monkeypatch.setattr(stage, "_torchrun", start)

    def run(**options) -> None:
        changed = load_recipe(recipe, {f"training.{key}": value for key, value in options.items()})
        stage.train(changed, f"{manifests}/train.jsonl", str(tmp_path / "t"), features)

    return run


def test_more_memory_than_there_is(begin, monkeypatch):
    with pytest.raises(Started):
        begin()
    monkeypatch.setattr(memory_fit, "host_memory", lambda: 1e5)
    with pytest.raises(
        UserError, match=r"^This training takes about .+ and this host has 0\.0001 GB to give: [^\n]+$"
    ):
        begin()


@pytest.fixture
def on_a_cpu(monkeypatch):
    """As on a machine without a GPU."""
    monkeypatch.setattr("slam_asr.models.precision.pick_device", lambda: torch.device("cpu"))


def test_compiling_without_a_compiler(begin, on_a_cpu, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^training\.compile needs a C\+\+ compiler, and g\+\+ is not here: [^\n]+$"
    ):
        begin(compile=True)
    (tmp_path / "my-compiler").touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"^training\.compile needs Python's headers"):
        begin(compile=True)
    (tmp_path / "Python.h").touch()
    with pytest.raises(Started):
        begin(compile=True)


def test_ligers_kernels_without_a_gpu(begin, on_a_cpu):
    with pytest.raises(UserError, match=r"^training\.liger needs a GPU"):
        begin(liger=True)


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is not None,
    reason="is about machines without the package liger-kernel",
)
def test_ligers_kernels_without_the_package():
    with pytest.raises(UserError, match=r"pip install liger-kernel"):
        kernels.require_kernels(Training(liger=True), torch.device("cuda"))
