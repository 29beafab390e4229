"""The predicted memory is what a training process takes, even for sizes not used to calibrate it."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"

CASES = [1, 2, 4, 5, 6] if os.environ.get("SLAM_ASR_SOAK") else [6]
"""Numbers of the benchmark's cases. Each takes a minute or two, and case 2, in bf16, longer on CPUs without
instructions for bf16."""


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    """The benchmark's module."""
    spec = importlib.util.spec_from_file_location("plan", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cold
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_predicted_memory_is_within_15_percent(plan, monkeypatch, case):
    # `compare` measures in a new process, which must find this checkout.
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parents[1]))
    result = plan.compare(case, plan.CASES[case])
    assert result["measured"] > 1e9
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.15)
