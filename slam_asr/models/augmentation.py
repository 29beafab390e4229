"""Augmentation of features in training: masks over time and over channels, and dropout.

With few hours of speech, a model learns the utterances by heart. If different frames and channels are missing
each time, it cannot rely on any single one. Masks follow SpecAugment (Park et al., 2019, arXiv:1904.08779),
but cover the encoder's outputs instead of a spectrogram, so that cached features can be used.
"""

import torch
from torch import nn
from torch.nn import functional

from slam_asr.config.sections import Masks


class Augmentation(nn.Module):
    """Sets random values of features to zero in training, and does nothing in evaluation mode.

    Args:
        dropout: probability that a value is set to zero; the others are scaled up to retain the mean.
        masks: the spans of frames and of channels that are set to zero.
    """

    def __init__(self, dropout: float = 0.0, masks: Masks | None = None) -> None:
        super().__init__()
        self.dropout, self.masks = dropout, masks or Masks()

    def forward(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Augment the features of each utterance [frames, encoder width].

        The given tensors are not changed.
        """
        if not self.training:
            return utterances
        return [self._augment(features) for features in utterances]

    def _augment(self, features: torch.Tensor) -> torch.Tensor:
        masks, (frames, channels) = self.masks, features.shape
        if masks.time_share:
            masked = draw_mask(frames, masks.time_share, masks.time_length).to(features.device)
            features = features.masked_fill(masked[:, None], 0.0)
        if masks.channel_share:
            masked = draw_mask(channels, masks.channel_share, masks.channel_length).to(features.device)
            features = features.masked_fill(masked, 0.0)
        return functional.dropout(features, self.dropout) if self.dropout else features


def draw_mask(size: int, share: float, longest: int) -> torch.Tensor:
    """Draw a mask of random spans, which may overlap.

    The numbers come from torch's random generator of the CPU, whose state is part of a checkpoint.

    Args:
        size: number of elements.
        share: mean sum of the spans' lengths, as a fraction of `size`.
        longest: length of the longest span; all lengths from 1 to this are equally likely.

    Returns:
        [size] bool, on the CPU: True for the elements of a span.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    longest = min(longest, size)
    # The expected number of spans is rounded up or down at random, so that its mean is exact.
    count = int(share * size / ((1 + longest) / 2) + torch.rand(()).item())
    for _ in range(count):
        length = int(torch.randint(1, longest + 1, ()))
        start = int(torch.randint(size - length + 1, ()))
        mask[start : start + length] = True
    return mask
