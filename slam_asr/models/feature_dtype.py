"""How features are stored: bf16, fp16, fp32, or fp8 with a scale for each frame.

fp8 is e4m3 (Micikevicius et al., 2022): 3 bits of mantissa, values up to 448. Each frame is scaled so
that its largest value fits, and the scale is kept in fp32: half of bf16's size and 4 bytes a frame.
"""

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
READ_DTYPES = DTYPES | {"fp8": torch.bfloat16}
"""What a reader gives: fp8 is scaled back, which bf16 holds without a loss that matters beside its own."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class QuantizedFrames(NamedTuple):
    """Frames as they are stored."""

    frames: torch.Tensor
    """[frames, width]."""
    scales: torch.Tensor | None
    """[frames] in fp32; only of fp8."""


def quantize(frames: torch.Tensor, dtype: str) -> QuantizedFrames:
    """[frames, width] of any precision → as it is stored."""
    if dtype != "fp8":
        return QuantizedFrames(frames.to(DTYPES[dtype]), None)
    frames = frames.float()
    scales = (frames.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return QuantizedFrames((frames / scales[:, None]).to(DTYPES[dtype]), scales)


def dequantize(values: QuantizedFrames) -> torch.Tensor:
    """What a reader gives: [frames, width]."""
    if values.scales is None:
        return values.frames
    return (values.frames.float() * values.scales[:, None]).to(READ_DTYPES["fp8"])


def bytes_per_frame(width: int, dtype: str) -> int:
    """Size of a stored frame."""
    return width * DTYPES[dtype].itemsize + (4 if dtype == "fp8" else 0)


def round_trip(frames: torch.Tensor, dtype: str) -> torch.Tensor:
    """Frames as they come back out of a store: what audio encoded on the way is rounded to, so that both are the same."""
    return dequantize(quantize(frames, dtype))
