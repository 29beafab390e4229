"""Dtypes of saved features: bf16, fp16, fp32, or fp8 with a scale per frame.

fp8 is e4m3 (Micikevicius et al., 2022): 3 bits of mantissa, values up to 448. Each frame is scaled so that
its largest value becomes 448, and the scale is saved in fp32: half the size of bf16, plus 4 bytes per frame.
"""

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
READ_DTYPES = DTYPES | {"fp8": torch.bfloat16}
"""Dtypes that a reader returns. fp8 becomes bf16, whose rounding is small compared with that of fp8."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class QuantizedFrames(NamedTuple):
    """Frames in the dtype of a feature store."""

    frames: torch.Tensor
    """[frames, width]."""
    scales: torch.Tensor | None
    """[frames] in fp32; None unless the dtype is fp8."""


def quantize(frames: torch.Tensor, dtype: str) -> QuantizedFrames:
    """Convert frames [frames, width] of any dtype to a store's dtype: bf16, fp16, fp32 or fp8."""
    if dtype != "fp8":
        return QuantizedFrames(frames.to(DTYPES[dtype]), None)
    frames = frames.float()
    scales = (frames.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return QuantizedFrames((frames / scales[:, None]).to(DTYPES[dtype]), scales)


def dequantize(values: QuantizedFrames) -> torch.Tensor:
    """Convert to [frames, width] in the dtype that a reader returns."""
    if values.scales is None:
        return values.frames
    return (values.frames.float() * values.scales[:, None]).to(READ_DTYPES["fp8"])


def bytes_per_frame(width: int, dtype: str) -> int:
    """Size of a saved frame in bytes, its scale included."""
    return width * DTYPES[dtype].itemsize + (4 if dtype == "fp8" else 0)


def round_trip(frames: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round frames [frames, width] as saving and reading them would.

    Audio that is encoded during training is rounded like this, so that it equals features from a store.
    """
    return dequantize(quantize(frames, dtype))
