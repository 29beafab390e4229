"""ZeRO checkpoints give exactly the engine's fp32 weights, and no code from a file runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slam_asr.conversion.zero_checkpoint import fp32_weights
from slam_asr.errors import UserError
from tests.conversion import engine_program
from tests.conversion.engine_program import PRECISIONS, STAGES
from tests.models.test_pickles import Harm
from tests.ranks import run_on_ranks

RANKS = [1, 2, *([4] if os.environ.get("SLAM_ASR_SOAK") else [])]


@pytest.fixture(scope="module", params=RANKS, ids=lambda n: f"{n} ranks")
def checkpoints(request, tmp_path_factory) -> Path:
    """A folder with the checkpoints and weights that `engine_program` wrote."""
    return run_on_ranks(engine_program.__file__, request.param, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.slow
def test_every_stage_in_fp32_and_bf16_converts_to_the_engines_own_weights(checkpoints):
    for stage in STAGES:
        for precision in PRECISIONS:
            folder = checkpoints / f"{stage}-{precision}"
            expected = load_file(folder / "expected.safetensors")
            del expected["losses"]
            weights = fp32_weights(folder / "global_step3")
            assert weights.keys() == expected.keys(), (stage, precision)
            for name, tensor in weights.items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, expected[name]), (stage, precision, name)


@pytest.mark.slow
def test_all_of_deepspeeds_stages_have_the_same_losses(checkpoints):
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 1e-3)):
        losses = [
            load_file(checkpoints / f"{s}-{precision}" / "expected.safetensors")["losses"] for s in STAGES
        ]
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_shard_is_refused(checkpoints):
    shards = sorted((checkpoints / "2-bf16" / "global_step3").glob("*optim_states.pt"))
    hidden = shards[-1].with_suffix(".hidden")
    shards[-1].rename(hidden)
    try:
        with pytest.raises(UserError, match=rf"{len(shards) - 1} of {len(shards)} optimiser shards"):
            fp32_weights(checkpoints / "2-bf16" / "global_step3")
    finally:
        hidden.rename(shards[-1])


def test_no_code_from_a_pickle_runs_and_the_function_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Harm(os.system, "touch it-ran")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"posix\.system"):
        fp32_weights(tmp_path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"a": 1})])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "model_states.pt").write_bytes(content)
    with pytest.raises(UserError) as refused:
        fp32_weights(tmp_path)
    assert "\n" not in refused.value.args[0]


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no DeepSpeed checkpoint"):
        fp32_weights(tmp_path)
