"""The projectors: trained modules that turn encoder frames into LLM positions.

All kinds follow SLAM-LLM's definitions and parameter names, so that its checkpoints can be loaded.

This file may import only torch and transformers, because `convert-checkpoint --to huggingface` copies it into
the folders that it writes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


class ProjectorOptions(Protocol):
    """The keys of the recipe's section `projector` that determine a projector's architecture.

    It is a protocol because an exported folder has no recipe.
    """

    downsampling: int
    hidden: int
    queries: int
    layers: int

    @property
    def kind(self) -> str:
        """A key of `PROJECTORS`."""


def positions_of(options: ProjectorOptions, span: int) -> int:
    """Return the number of LLM positions that an utterance takes; `span` is from `EncoderSpec.span_of`."""
    return options.queries if options.kind == "q-former" else span // options.downsampling


class SpeechProjector(nn.Module, ABC):
    """Base class of projectors: utterances of unequal lengths are projected, and joined without padding."""

    @abstractmethod
    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project the features of each utterance [frames, encoder width] to [positions, LLM width]."""

    def forward(self, utterances: list[torch.Tensor], positions: list[int] | None = None) -> torch.Tensor:
        """Project utterances of unequal lengths.

        Args:
            utterances: features, each [frames, encoder width], in any floating-point dtype.
            positions: number of LLM positions reserved for each utterance. Reserved positions that the frames
                do not fill become zero vectors, as in SLAM-LLM; surplus outputs are dropped. If None,
                each utterance takes as many positions as its frames fill.

        Returns:
            [sum of positions, LLM width] in the weights' dtype, one utterance after another.
        """
        dtype = next(self.parameters()).dtype
        # Saved features may have another dtype than the weights, such as bf16 features for fp32 weights.
        outputs = self.project([u.to(dtype) for u in utterances])
        if positions is not None:
            outputs = [
                o if len(o) == n else functional.pad(o[:n], (0, 0, 0, max(0, n - len(o))))
                for o, n in zip(outputs, positions, strict=True)
            ]
        return torch.cat(outputs)


class LinearProjector(SpeechProjector):
    """`linear`: concatenates each group of k consecutive frames, then applies Linear, ReLU and Linear.

    Groups do not overlap. A tail of fewer than k frames is dropped, so T frames give T // k positions. Both
    linear layers have biases. The projector has 18 880 512 parameters for encoder width 1024, LLM width 4096,
    k = 5 and hidden width 2048 (Ma et al., 2024, arXiv:2402.08846).
    """

    def __init__(self, options: ProjectorOptions, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.downsampling = options.downsampling
        self.linear1 = nn.Linear(options.downsampling * encoder_width, options.hidden)
        self.linear2 = nn.Linear(options.hidden, llm_width)

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project all utterances in one matrix product."""
        joined, counts = join_frames(utterances, self.downsampling)
        return list(self.linear2(torch.relu(self.linear1(joined))).split(counts))


class ConvolutionProjector(SpeechProjector):
    """`cov1d-linear`: applies a convolution over k frames with stride k, then ReLU, Linear, ReLU and Linear.

    SLAM-LLM calls it EncoderProjectorCov1d; `cov1d` is SLAM-LLM's spelling.
    """

    def __init__(self, options: ProjectorOptions, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.downsampling = k = options.downsampling
        self.conv1d = nn.Conv1d(encoder_width, encoder_width, k, stride=k)
        self.linear1 = nn.Linear(encoder_width, options.hidden)
        self.linear2 = nn.Linear(options.hidden, llm_width)

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project all utterances at once.

        Kernel and stride are equal, so each position depends on its own k frames only. Utterances can
        therefore be convolved together without padding.
        """
        joined, counts = join_frames(utterances, self.downsampling)
        # [sum of positions, encoder width, k]: every position is a batch row of the convolution.
        windows = joined.unflatten(1, (self.downsampling, -1)).transpose(1, 2)
        hidden = torch.relu(self.conv1d(windows).squeeze(2))
        return list(self.linear2(torch.relu(self.linear1(hidden))).split(counts))


class QFormerProjector(SpeechProjector):
    """`q-former`: lets a fixed number of learnt queries attend to the encoder's frames.

    It consists of BLIP-2's Q-Former, a Linear and a LayerNorm, as in SLAM-LLM (EncoderProjectorQFormer). The
    Q-Former has BLIP-2's default sizes, except for the number of layers and the encoder width. Its dropout is
    active in training. Each query gives one position, however long the utterance is.
    """

    def __init__(self, options: ProjectorOptions, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(encoder_hidden_size=encoder_width, num_hidden_layers=options.layers)
        self.query = nn.Parameter(torch.randn(1, options.queries, config.hidden_size))
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(config.hidden_size, llm_width)
        self.norm = nn.LayerNorm(llm_width, eps=1e-5)

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project all utterances at once, padded to the longest one; the padding is masked."""
        lengths = torch.tensor([len(u) for u in utterances], device=utterances[0].device)
        frames = pad_sequence(utterances, batch_first=True)
        mask = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]).long()
        attended = self.qformer(
            query_embeds=self.query.expand(len(utterances), -1, -1),
            encoder_hidden_states=frames,
            encoder_attention_mask=mask,
        )
        return list(self.norm(self.linear(attended.last_hidden_state)))


PROJECTORS: dict[str, Callable[[ProjectorOptions, int, int], SpeechProjector]] = {
    "linear": LinearProjector,
    "cov1d-linear": ConvolutionProjector,
    "q-former": QFormerProjector,
}


def join_frames(utterances: list[torch.Tensor], k: int) -> tuple[torch.Tensor, list[int]]:
    """Concatenate each group of k consecutive frames, without overlap; a tail of fewer than k is dropped.

    Args:
        utterances: features, each [frames, width].
        k: frames per position.

    Returns:
        [sum of positions, k · width], one utterance after another; and each utterance's number of positions.
    """
    counts = [len(u) // k for u in utterances]
    groups = [u[: n * k].reshape(n, k * u.shape[1]) for u, n in zip(utterances, counts, strict=True)]
    return torch.cat(groups), counts


def build_projector(
    options: ProjectorOptions, encoder_width: int, llm_width: int, seed: int = 0
) -> SpeechProjector:
    """Build a projector in float32, with random weights that depend only on the seed."""
    # The caller's random state is restored afterwards. No GPU's state is saved (`devices=[]`), because the
    # weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PROJECTORS[options.kind](options, encoder_width, llm_width)
