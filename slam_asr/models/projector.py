"""The trained part: encoder frames in, LLM positions out."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from slam_asr.recipe import Projector


def positions_of(options: Projector, span: int) -> int:
    """LLM positions that an utterance of `span` encoder frames takes."""
    return options.queries if options.kind == "q-former" else span // options.downsampling


class SpeechProjector(nn.Module, ABC):
    """What the projectors share: utterances of unequal lengths, side by side without padding."""

    @abstractmethod
    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder outputs, each [frames, encoder width] → [positions, LLM width] each."""

    def forward(self, utterances: list[torch.Tensor], positions: list[int] | None = None) -> torch.Tensor:
        """Project utterances of unequal lengths.

        Args:
            utterances: encoder outputs, each [frames, encoder width].
            positions: LLM positions reserved for each; where the encoder gave a frame too few to fill
                the last one, that is a zero vector, as in the reference.

        Returns:
            [sum of positions, LLM width], utterance after utterance.
        """
        dtype = next(self.parameters()).dtype
        outputs = self.project([u.to(dtype) for u in utterances])
        if positions is not None:
            outputs = [
                o if len(o) == n else functional.pad(o[:n], (0, 0, 0, max(0, n - len(o))))
                for o, n in zip(outputs, positions, strict=True)
            ]
        return torch.cat(outputs)


class LinearProjector(SpeechProjector):
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

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """One product for all utterances."""
        joined, counts = join_frames(utterances, self.downsampling)
        return list(self.linear2(torch.relu(self.linear1(joined))).split(counts))


class ConvolutionProjector(SpeechProjector):
    """`cov1d-linear`: a convolution over k frames with stride k, ReLU, Linear, ReLU, Linear.

    As in the reference's framework (SLAM-LLM, EncoderProjectorCov1d).
    """

    def __init__(self, options: Projector, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.downsampling = options.downsampling
        self.conv1d = nn.Conv1d(
            encoder_width, encoder_width, options.downsampling, stride=options.downsampling
        )
        self.linear1 = nn.Linear(encoder_width, options.hidden)
        self.linear2 = nn.Linear(options.hidden, llm_width)

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Kernel and stride are equal, so each position is a convolution of its own, over k frames."""
        joined, counts = join_frames(utterances, self.downsampling)
        windows = joined.unflatten(1, (self.downsampling, -1)).transpose(1, 2)
        hidden = torch.relu(self.conv1d(windows).squeeze(2))
        return list(self.linear2(torch.relu(self.linear1(hidden))).split(counts))


class QFormerProjector(SpeechProjector):
    """`q-former`: a fixed number of learnt queries that look at the encoder's frames.

    BLIP-2's Q-Former in its default sizes, then Linear and LayerNorm, as in the reference's framework
    (SLAM-LLM, EncoderProjectorQFormer). Its dropout is at work in training.
    """

    def __init__(self, options: Projector, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(encoder_hidden_size=encoder_width, num_hidden_layers=options.layers)
        self.query = nn.Parameter(torch.randn(1, options.queries, config.hidden_size))
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(config.hidden_size, llm_width)
        self.norm = nn.LayerNorm(llm_width, eps=1e-5)

    def project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        """Frames are padded to the longest and masked."""
        lengths = torch.tensor([len(u) for u in utterances], device=utterances[0].device)
        frames = pad_sequence(utterances, batch_first=True)
        mask = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]).long()
        looked = self.qformer(
            query_embeds=self.query.expand(len(utterances), -1, -1),
            encoder_hidden_states=frames,
            encoder_attention_mask=mask,
        )
        return list(self.norm(self.linear(looked.last_hidden_state)))


PROJECTORS = {"linear": LinearProjector, "cov1d-linear": ConvolutionProjector, "q-former": QFormerProjector}


def join_frames(utterances: list[torch.Tensor], k: int) -> tuple[torch.Tensor, list[int]]:
    """k neighbouring frames side by side, the tail dropped → [sum of positions, k · width], and each one's positions."""
    counts = [len(u) // k for u in utterances]
    return torch.cat(
        [u[: n * k].reshape(n, k * u.shape[1]) for u, n in zip(utterances, counts, strict=True)]
    ), counts


def build_projector(options: Projector, encoder_width: int, llm_width: int, seed: int = 0) -> SpeechProjector:
    """A new projector in float32, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PROJECTORS[options.kind](options, encoder_width, llm_width)
