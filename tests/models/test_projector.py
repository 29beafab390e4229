"""Projectors: as the reference defines them, and the same in company as alone."""

import pytest
import torch
from torch import nn

from slam_asr.models.projector import PROJECTORS, build_projector, positions_of
from slam_asr.recipe import Projector

LENGTHS = (5, 23, 4, 50)


def small(kind: str) -> Projector:
    return Projector(kind=kind, hidden=16, queries=7, layers=1)


@pytest.fixture(params=PROJECTORS)
def projector(request):
    return build_projector(small(request.param), 8, 12).eval(), small(request.param)


def test_a_new_projector_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = build_projector(Projector(hidden=4), 3, 2, seed=5)
    torch.manual_seed(2)
    again = build_projector(Projector(hidden=4), 3, 2, seed=5)
    other = build_projector(Projector(hidden=4), 3, 2, seed=6)
    assert torch.equal(first.linear1.weight, again.linear1.weight)
    assert not torch.equal(first.linear1.weight, other.linear1.weight)


@torch.no_grad()
def test_projecting_together_is_projecting_alone(projector):
    model, options = projector
    utterances = [torch.randn(n, 8) for n in LENGTHS]
    positions = [positions_of(options, n) for n in LENGTHS]
    together = model(utterances, positions)
    assert together.shape == (sum(positions), 12)
    alone = torch.cat([model([u], [n]) for u, n in zip(utterances, positions, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_position_that_the_encoder_gave_too_few_frames_for_is_a_zero_vector(projector):
    model, options = projector
    frames = torch.randn(49, 8)
    if options.kind == "q-former":
        # As many positions as it has queries, whatever the number of frames: none is missing.
        out = model([frames], [positions_of(options, 50)])
        assert len(out) == options.queries and out.any(1).all()
        return
    out = model([frames], [positions_of(options, 50)])
    assert len(out) == 10 and not out[9].any() and out[8].all()


@torch.no_grad()
def test_the_convolution_is_that_of_the_reference():
    model = build_projector(small("cov1d-linear"), 8, 12)
    frames = torch.randn(23, 8)
    # The reference's forward pass: [batch, frames, width] transposed, convolved, and transposed back.
    x = model.conv1d(frames[None].transpose(1, 2)).transpose(1, 2)
    wanted = model.linear2(nn.functional.relu(model.linear1(nn.functional.relu(x))))[0]
    torch.testing.assert_close(model([frames]), wanted)


def test_checkpoints_of_the_reference_have_these_names():
    names = {
        kind: {n.split(".")[0] for n, _ in build_projector(small(kind), 8, 12).named_parameters()}
        for kind in PROJECTORS
    }
    assert names == {
        "linear": {"linear1", "linear2"},
        "cov1d-linear": {"conv1d", "linear1", "linear2"},
        "q-former": {"query", "qformer", "linear", "norm"},
    }


@torch.no_grad()
def test_padding_of_others_does_not_reach_a_q_former():
    model = build_projector(small("q-former"), 8, 12).eval()
    short, long = torch.randn(3, 8), torch.randn(40, 8)
    torch.testing.assert_close(model([short, long])[:7], model([short]), atol=1e-5, rtol=1e-5)
