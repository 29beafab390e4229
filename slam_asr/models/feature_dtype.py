"""Dtypes of saved features: bf16, fp16, fp32, or fp8 with a scale per frame.

fp8 is e4m3 (Micikevicius et al., 2022): 3 bits of mantissa, values up to 448. Each frame is divided by
a scale of its own, so that its largest absolute value becomes 448. The scale is saved in fp32. A frame in fp8
therefore takes half the size of bf16, plus 4 bytes.
"""

from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class QuantizedFrames(NamedTuple):
    """Frames in the dtype of a feature store."""

    frames: torch.Tensor
    """[frames, width]."""
    scales: torch.Tensor | None
    """[frames] in fp32; None unless the dtype is fp8."""


def quantize(frames: torch.Tensor, dtype: str) -> QuantizedFrames:
    """Convert frames to the dtype of a feature store.

    Args:
        frames: [frames, width] in any floating-point dtype.
        dtype: bf16, fp16, fp32 or fp8.

    Returns:
        The frames [frames, width] in that dtype; for fp8 also the scales [frames] in fp32.
    """
    if dtype != "fp8":
        return QuantizedFrames(frames.to(DTYPES[dtype]), None)
    # The division is in fp32: in bf16 its result would be rounded before it is rounded to fp8.
    frames = frames.float()
    # The lower bound prevents 0 / 0 = NaN for a frame of zeros.
    scales = (frames.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return QuantizedFrames((frames / scales[:, None]).to(DTYPES[dtype]), scales)


def dequantize(values: QuantizedFrames) -> torch.Tensor:
    """Convert the result of `quantize` to [frames, width] in the dtype that a reader returns.

    fp8 becomes bf16, whose rounding error is small compared with that of fp8. The other dtypes are unchanged.
    """
    if values.scales is None:
        return values.frames
    return (values.frames.float() * values.scales[:, None]).to(torch.bfloat16)


def bytes_per_frame(width: int, dtype: str) -> int:
    """Return the size of a saved frame in bytes, including its scale."""
    return width * DTYPES[dtype].itemsize + (4 if dtype == "fp8" else 0)


def round_trip(frames: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round frames [frames, width] as saving and reading them would.

    If a frozen encoder encodes audio during training or decoding, this function rounds the features, so that
    they equal features from a store.

    Returns:
        [frames, width] in the dtype that a reader returns.
    """
    return dequantize(quantize(frames, dtype))
