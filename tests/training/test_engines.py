"""Every engine takes the same steps, resumes exactly, and is not damaged by a gradient that is not finite."""

import json

import pytest

from tests.ranks import run_on_ranks
from tests.training import engines_program
from tests.training.engines_program import ENGINES, HALF, PRECISIONS, STEPS


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"{n} ranks")
def results(request, tmp_path_factory) -> dict[str, dict]:
    folder = run_on_ranks(engines_program.__file__, request.param, tmp_path_factory.mktemp("engines"))
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
def test_all_engines_have_the_same_losses_over_twenty_steps(results):
    for precision in PRECISIONS:
        first = results[f"zero-0 {precision}"]["uninterrupted"]
        assert len(set(first)) == len(first) == STEPS
        for engine in ENGINES:
            tolerance = 1e-5 if precision == "fp32" else 3e-3
            assert results[f"{engine} {precision}"]["uninterrupted"] == pytest.approx(first, rel=tolerance), (
                engine
            )


@pytest.mark.slow
def test_resuming_from_a_saved_state_is_bit_equal_and_another_engine_can_resume_too(results):
    for name, run in results.items():
        assert run["updates"] == HALF, name
        assert run["same kind"] == run["uninterrupted"][HALF:], name
        assert run["other kind"] == pytest.approx(
            run["uninterrupted"][HALF:], rel=1e-5 if "fp32" in name else 3e-3
        ), name


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_leaves_the_weights_unchanged(results):
    for name, run in results.items():
        assert run["unchanged"], name
        assert run["after"][0] > 0, name
