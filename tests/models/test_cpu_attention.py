"""CPU attention equals torch's own, forward and backward, for any length and any number of key heads."""

import pytest
import torch
from torch.nn import functional

from slam_asr.models.cpu_attention import BLOCK, causal_attention


@pytest.mark.parametrize("positions", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_equal_torchs(positions, heads, key_heads, scale):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(h, positions, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]
    weights = torch.randn(heads, positions, 16, generator=generator, dtype=torch.float64)
    expected = functional.scaled_dot_product_attention(
        *(t[None] for t in inputs), is_causal=True, scale=scale, enable_gqa=True
    )[0]
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    output = causal_attention(*inputs, scale)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        # Gradients of keys and values are summed in fp32 even for these fp64 inputs.
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_in_bf16_the_error_is_comparable_to_torchs():
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(h, 300, 64, generator=generator) for h in (9, 3, 3)]
    reference = functional.scaled_dot_product_attention(
        *(t[None] for t in exact), is_causal=True, enable_gqa=True
    )[0]
    rounded = [t.bfloat16() for t in exact]
    by_torch = functional.scaled_dot_product_attention(
        *(t[None] for t in rounded), is_causal=True, enable_gqa=True
    )[0]
    our_error, torchs_error = [
        (t.float() - reference).pow(2).mean().sqrt() for t in (causal_attention(*rounded), by_torch)
    ]
    assert our_error < 2 * torchs_error


def test_later_positions_have_no_influence():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 200, 8, generator=generator) for _ in range(3))
    before = causal_attention(query, key, value)
    key[:, 150:] = value[:, 150:] = 99.0
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :150], after[:, :150]) and not torch.equal(before[:, 150:], after[:, 150:])
