"""Projectors are the same as the reference's, and project each utterance independently of its batch."""

import pytest
import torch
from torch import nn

from slam_asr.config.recipe import Projector
from slam_asr.models.projector import PROJECTORS, build_projector, positions_of

LENGTHS = (5, 23, 4, 50)


def small_options(kind: str) -> Projector:
    return Projector(kind=kind, hidden=16, queries=7, layers=1)


@pytest.fixture(params=PROJECTORS)
def projector(request):
    return build_projector(small_options(request.param), 8, 12).eval(), small_options(request.param)


def test_a_new_projector_depends_on_nothing_but_its_seed():
    torch.manual_seed(1)
    first = build_projector(Projector(hidden=4), 3, 2, seed=5)
    torch.manual_seed(2)
    again = build_projector(Projector(hidden=4), 3, 2, seed=5)
    other = build_projector(Projector(hidden=4), 3, 2, seed=6)
    assert torch.equal(first.linear1.weight, again.linear1.weight)
    assert not torch.equal(first.linear1.weight, other.linear1.weight)


@torch.no_grad()
def test_batched_and_single_projection_agree(projector):
    model, options = projector
    utterances = [torch.randn(n, 8) for n in LENGTHS]
    positions = [positions_of(options, n) for n in LENGTHS]
    together = model(utterances, positions)
    assert together.shape == (sum(positions), 12)
    alone = torch.cat([model([u], [n]) for u, n in zip(utterances, positions, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_position_with_too_few_frames_becomes_a_zero_vector(projector):
    model, options = projector
    frames = torch.randn(49, 8)
    if options.kind == "q-former":
        # A Q-Former has one position per query, whatever the number of frames.
        out = model([frames], [positions_of(options, 50)])
        assert len(out) == options.queries and out.any(1).all()
        return
    out = model([frames], [positions_of(options, 50)])
    assert len(out) == 10 and not out[9].any() and out[8].all()


@torch.no_grad()
def test_the_convolution_equals_that_of_the_reference_implementation():
    model = build_projector(small_options("cov1d-linear"), 8, 12)
    frames = torch.randn(23, 8)
    # The reference's forward pass: transpose [batch, frames, width], convolve, transpose back.
    x = model.conv1d(frames[None].transpose(1, 2)).transpose(1, 2)
    expected = model.linear2(nn.functional.relu(model.linear1(nn.functional.relu(x))))[0]
    torch.testing.assert_close(model([frames]), expected)


def test_parameter_names_are_those_of_the_references_checkpoints():
    names = {
        kind: {n.split(".")[0] for n, _ in build_projector(small_options(kind), 8, 12).named_parameters()}
        for kind in PROJECTORS
    }
    assert names == {
        "linear": {"linear1", "linear2"},
        "cov1d-linear": {"conv1d", "linear1", "linear2"},
        "q-former": {"query", "qformer", "linear", "norm"},
    }


@torch.no_grad()
def test_a_q_former_ignores_padding():
    model = build_projector(small_options("q-former"), 8, 12).eval()
    short, long = torch.randn(3, 8), torch.randn(40, 8)
    torch.testing.assert_close(model([short, long])[:7], model([short]), atol=1e-5, rtol=1e-5)
