"""A conversion reads exactly the engine's fp32 weights from a training run's checkpoint.

This is checked for every engine, with one and two processes, and with four in `make soak`.
"""

import os

import pytest
import torch
from safetensors.torch import load_file

from slam_asr.artifacts.checkpoint import require
from tests.conversion import saved_program
from tests.ranks import run_on_ranks
from tests.training.engines_program import ENGINES, PRECISIONS


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, *([4] if os.environ.get("SLAM_ASR_SOAK") else [])])
def test_a_checkpoint_holds_the_engines_own_weights(ranks, tmp_path):
    folder = run_on_ranks(saved_program.__file__, ranks, tmp_path)
    for kind in ENGINES:
        for precision in PRECISIONS:
            place = folder / f"{kind}-{precision}"
            expected, found = (
                load_file(place / "expected.safetensors"),
                require(str(place)).tensors("weights"),
            )
            assert found.keys() == expected.keys() and len(found) == 6, (kind, precision)
            for name, tensor in expected.items():
                assert found[name].dtype == torch.float32
                assert torch.equal(found[name], tensor), (kind, precision, name)
