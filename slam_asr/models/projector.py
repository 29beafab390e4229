"""The trained part: encoder frames in, LLM positions out."""

import torch
from torch import nn

from slam_asr.recipe import Projector


class LinearProjector(nn.Module):
    """k neighbouring frames joined, then Linear, ReLU, Linear; both with bias.

    The tail that does not fill k frames is dropped: N = T // k positions. 18 880 512 parameters for
    encoder width 1024, LLM width 4096, k = 5 and hidden width 2048 (Ma et al., 2024,
    arXiv:2402.08846).
    """

    def __init__(self, options: Projector, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.downsampling = options.downsampling
        self.linear1 = nn.Linear(options.downsampling * encoder_width, options.hidden)
        self.linear2 = nn.Linear(options.hidden, llm_width)

    def positions(self, frames: int) -> int:
        """LLM positions that `frames` encoder frames become."""
        return frames // self.downsampling

    def forward(self, utterances: list[torch.Tensor]) -> torch.Tensor:
        """Project utterances of unequal lengths without padding.

        Args:
            utterances: encoder outputs, each [frames, encoder width].

        Returns:
            [sum of positions, LLM width], utterance after utterance.
        """
        k = self.downsampling
        joined = torch.cat([u[: len(u) // k * k].reshape(len(u) // k, k * u.shape[1]) for u in utterances])
        return self.linear2(torch.relu(self.linear1(joined.to(self.linear1.weight.dtype))))


def build_projector(options: Projector, encoder_width: int, llm_width: int, seed: int = 0) -> LinearProjector:
    """A new projector in float32, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearProjector(options, encoder_width, llm_width)
