"""Attention on a CPU: what torch's own computes, forward and back, for any length and any sharing of heads."""

import pytest
import torch
from torch.nn import functional

from slam_asr.models.cpu_attention import BLOCK, causal_attention


@pytest.mark.parametrize("positions", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_are_torchs_own(positions, heads, key_heads, scale):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(h, positions, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]
    weights = torch.randn(heads, positions, 16, generator=generator, dtype=torch.float64)
    expected = functional.scaled_dot_product_attention(
        *(t[None] for t in inputs), is_causal=True, scale=scale, enable_gqa=True
    )[0]
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = causal_attention(*inputs, scale)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        # Gradients of keys and values are summed in fp32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_bf16_it_is_as_near_to_the_truth_as_torchs_own():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(h, 300, 64, generator=generator) for h in (9, 3, 3)]
    truth = functional.scaled_dot_product_attention(
        *(t[None] for t in exact), is_causal=True, enable_gqa=True
    )[0]
    rounded = [t.bfloat16() for t in exact]
    torchs = functional.scaled_dot_product_attention(
        *(t[None] for t in rounded), is_causal=True, enable_gqa=True
    )[0]
    errors = [(t.float() - truth).pow(2).mean().sqrt() for t in (causal_attention(*rounded), torchs)]
    assert errors[0] < 2 * errors[1]


def test_nothing_comes_from_later_positions():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 200, 8, generator=generator) for _ in range(3))
    before = causal_attention(query, key, value)
    key[:, 150:] = value[:, 150:] = 99.0
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :150], after[:, :150]) and not torch.equal(before[:, 150:], after[:, 150:])
