"""Encodes a batch of waveforms of unequal lengths with WavLM, HuBERT or wav2vec 2.0.

Each utterance gets the same frames as when it is encoded alone, except for rounding. To achieve this, padding
is masked in the attention. The base models also normalise their first convolution's output over time. If
padding entered these statistics, the error would be as large as the output itself.

This file may import only torch, because `convert-checkpoint --to huggingface` copies it into the folders that
it writes.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def frames_of(config: Any, samples: int) -> int:
    """Return the number of frames for a waveform; 0 if it is too short for one.

    Args:
        config: the encoder's configuration in transformers.
        samples: length of the waveform at 16 kHz.
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def mask_first_norm(encoder: Any) -> None:
    """If a group norm follows an encoder's first convolution, replace it by a `MaskedGroupNorm`."""
    first = encoder.feature_extractor.conv_layers[0]
    if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
        first.layer_norm = MaskedGroupNorm(first.layer_norm, first.conv)


def encode_waveforms(encoder: Any, waveforms: torch.Tensor, samples: list[int]) -> list[torch.Tensor]:
    """Encode waveforms in one batch.

    Args:
        encoder: transformers' model, after `mask_first_norm`.
        waveforms: [utterances, samples], on the encoder's device and in its dtype; shorter utterances are
            padded with zeros at the end.
        samples: each utterance's number of samples.

    Returns:
        A tensor [frames, width] per utterance. It has 0 frames if the utterance is too short for one.
    """
    frames = [frames_of(encoder.config, n) for n in samples]
    encodable = [i for i, n in enumerate(frames) if n > 0]
    empty = waveforms.new_zeros(0, encoder.config.hidden_size)
    if not encodable:
        return [empty for _ in frames]
    lengths = torch.tensor([samples[i] for i in encodable], device=waveforms.device)
    waveforms = waveforms[encodable, : int(lengths.max())]
    # Without padding no mask is needed, and attention may use its faster kernels.
    mask = None
    if len(set(lengths.tolist())) > 1:
        mask = (torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None]).long()
    for norm in encoder.modules():
        if isinstance(norm, MaskedGroupNorm):
            norm.samples = None if mask is None else lengths
    # Utterances that are too short for a frame were not in the batch. The others take the outputs in order.
    outputs = iter(encoder(waveforms, attention_mask=mask).last_hidden_state)
    return [next(outputs)[:n] if n else empty for n in frames]


class MaskedGroupNorm(nn.Module):
    """A group norm with one channel per group. Its statistics exclude padding.

    Args:
        norm: the norm that this one replaces; its weights are shared.
        convolution: the unpadded convolution of the waveform whose outputs are normalised.
    """

    def __init__(self, norm: nn.GroupNorm, convolution: nn.Conv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.kernel, self.stride = convolution.kernel_size[0], convolution.stride[0]
        self.samples: torch.Tensor | None = None
        """[utterances] int64: each utterance's length in samples, enough for at least one frame. None if the
        batch has no padding."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [utterances, channels, frames] over the frames; the shape is unchanged."""
        if self.samples is None:
            return functional.group_norm(hidden, hidden.shape[1], self.weight, self.bias, self.eps)
        # The norm is computed in fp32, because sums over thousands of frames would be inexact in half
        # precision. Padding is set to 0 after the mean is subtracted, so that it adds nothing to the
        # variance. https://github.com/facebookresearch/fairseq/issues/3227 shows what padding does otherwise.
        x, count = hidden.float(), ((self.samples - self.kernel) // self.stride + 1)[:, None, None]
        valid = torch.arange(x.shape[2], device=x.device) < count
        centred = (x - (x * valid).sum(2, keepdim=True) / count) * valid
        scaled = centred * torch.rsqrt((centred**2).sum(2, keepdim=True) / count + self.eps)
        return (scaled * self.weight.float()[:, None] + self.bias.float()[:, None]).to(hidden.dtype)
