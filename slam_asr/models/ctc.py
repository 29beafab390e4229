"""CTC on the projector's outputs: the projector learns to spell transcripts in the LLM's token embeddings.

The LLM's layers are not run for this. A projector that starts from random weights in front of a frozen LLM
learns nothing for thousands of steps, because it has to discover which position of the audio belongs to which
word of the answer. Connectionist temporal classification (CTC; Graves et al., 2006) learns this alignment at
a hundredth of the cost. The logits for CTC are negative squared distances between the projector's outputs and
the LLM's embeddings of the tokens that occur in the transcripts.

CTC's blank is the embedding of a line break, because this vector disturbs the LLM least between words. In a
comparison, SmolLM2-135M had to repeat a text with one extra vector between every two tokens. It repeated 58 %
of the tokens if this vector was the line break's, 51 % if it was the comma's, and 21 % if it was zero.

CTC alone only needs outputs to be closer to the right token than to others; they may be anywhere, even where
the LLM has never seen an embedding. A second loss therefore draws each output to its expected embedding: the
mean of the token embeddings, weighted by the token probabilities. The LLM then sees outputs that resemble the
transcript's own tokens.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from slam_asr.generation.ctc_prefix import CtcSpelling
from slam_asr.models.encoders.frontend import Prepared

BLANK = 0
"""Index of CTC's blank among the tokens."""
INITIAL_SHARPNESS = 20.0
"""Initial factor of the logits: a distance of one mean embedding length lowers a logit by half the factor."""


@dataclass
class CtcBatch:
    """Utterances for a training phase that uses CTC without the LLM."""

    audio: list[torch.Tensor | Prepared]
    """One per utterance: features [frames, encoder width], or the encoder's input; all of one kind."""
    positions: list[int]
    """Number of LLM positions of each utterance's audio."""
    targets: list[torch.Tensor]
    """Tokens of each utterance, [tokens] int64, as indices of `CtcVocabulary`, on the CPU. The list is empty
    if the batch only lets a process without work take part in the communication."""
    distance_weight: float = 0.0
    """Weight of the loss that draws outputs to their expected embeddings."""

    @property
    def filled(self) -> int:
        """Number of LLM positions; nothing is padded."""
        return sum(self.positions)

    @property
    def cells(self) -> int:
        """Number of LLM positions including padding, as in `Batch`: the same as `filled`."""
        return self.filled

    def to(self, device: torch.device | str) -> "CtcBatch":
        """Return a copy of the batch on a device; `targets` remains on the CPU."""
        return replace(self, audio=[a.to(device) for a in self.audio])


class CtcHead(nn.Module):
    """Classifies the projector's outputs by their distances from token embeddings.

    Args:
        embeddings: [1 + tokens, LLM width] float32; the blank's embedding comes first.
        dtype: dtype of the products of outputs and embeddings.
    """

    size: torch.Tensor
    """Scalar: mean length (Euclidean norm) of the embeddings, the unit of all distances."""
    embeddings: torch.Tensor
    """[1 + tokens, LLM width]: the embeddings, divided by `size`."""
    half_squares: torch.Tensor
    """[1 + tokens] float32: half of the squared length of each of these embeddings."""

    def __init__(self, embeddings: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        size = embeddings.norm(dim=1).mean()
        scaled = embeddings / size
        self.register_buffer("size", size)
        self.register_buffer("embeddings", scaled.to(dtype))
        self.register_buffer("half_squares", scaled.square().sum(1) / 2)
        # The factor's logarithm is trained, so that the factor stays positive whatever the optimiser does.
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(INITIAL_SHARPNESS)))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return logits [positions, 1 + tokens] in float32 for outputs [positions, LLM width]."""
        sharpness = self.log_sharpness.float().exp()
        # Scaling the outputs is cheaper than scaling the logits, which are many more.
        products = (outputs * (sharpness / self.size)).to(self.embeddings.dtype) @ self.embeddings.T
        # -|output - embedding|² / 2, without |output|², which is the same for all tokens.
        return products.float() - self.half_squares * sharpness

    def distances(self, outputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the squared distance of each output from its expected embedding, [positions] float32.

        Distances are in units of the embeddings' mean length.

        Args:
            outputs: [positions, LLM width], the projector's.
            logits: [positions, 1 + tokens], from `forward`.
        """
        # `no_grad` makes the expected embeddings constants: the loss moves only the outputs towards them.
        with torch.no_grad():
            expected = logits.softmax(1).to(self.embeddings.dtype) @ self.embeddings
        return (outputs.float() / self.size - expected.float()).square().sum(1)


class AuxiliaryCtc:
    """CTC's loss, which is added to the LLM's: the projector's outputs must also spell the transcript.

    Args:
        head: classifies the outputs; it is frozen here.
        weight: factor of the loss.
    """

    def __init__(self, head: CtcHead, weight: float) -> None:
        self.head, self.weight = head.requires_grad_(False), weight

    def loss(self, outputs: torch.Tensor, positions: list[int], targets: list[torch.Tensor]) -> torch.Tensor:
        """Return the weighted loss, summed over utterances, as a scalar in float32.

        Args:
            outputs: [positions of all utterances, LLM width], the projector's.
            positions: number of positions of each utterance.
            targets: tokens of each utterance, [tokens] int64, on the CPU.
        """
        return self.weight * ctc_loss(self.head(outputs), positions, targets)


class BlankFilter:
    """Finds the positions that CTC takes for blanks.

    Args:
        head: classifies the projector's outputs. Nothing of it is trained.
        threshold: least probability of the blank.
    """

    def __init__(self, head: CtcHead, threshold: float) -> None:
        self.head, self.threshold = head.requires_grad_(False), threshold

    @torch.no_grad()
    def find(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return [positions] bool, True at blanks, for the projector's outputs [positions, LLM width]."""
        logits = self.head(outputs.float())
        return logits[:, BLANK] - logits.logsumexp(1) >= math.log(self.threshold)


class Speller:
    """Computes CTC's log probabilities of the projector's outputs for a search.

    Args:
        head: classifies the outputs.
        columns: `columns` and `first_columns` of `CtcSpelling`.
    """

    def __init__(self, head: CtcHead, columns: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.head, self.columns = head, columns

    def spell(self, outputs: torch.Tensor, positions: list[int]) -> CtcSpelling:
        """Return CTC's log probabilities of all utterances.

        Args:
            outputs: [positions of all utterances, LLM width], the projector's, in any floating-point dtype.
            positions: number of positions of each utterance.
        """
        return CtcSpelling.of(self.head(outputs.float()), positions, *self.columns)


def ctc_loss(logits: torch.Tensor, positions: list[int], targets: list[torch.Tensor]) -> torch.Tensor:
    """Return CTC's loss, summed over utterances, as a scalar in float32.

    An utterance has no path, and counts as 0, if it has fewer positions than CTC needs: one for each token,
    and one for the blank between each two equal neighbours.

    Args:
        logits: [positions of all utterances, 1 + tokens] float32.
        positions: number of positions of each utterance.
        targets: tokens of each utterance, [tokens] int64, on the CPU.
    """
    if not any(positions):
        return logits.sum() * 0.0  # torch's CTC refuses an empty tensor
    # CTC needs only the columns of an utterance's own tokens: about a hundred instead of ten thousand.
    # `total` normalises them over all tokens, so the loss is the same.
    scores, indices = [], []
    for rows, total, target in zip(
        logits.split(positions), logits.logsumexp(1, keepdim=True).split(positions), targets, strict=True
    ):
        own_tokens, index = torch.unique(target, return_inverse=True)
        columns = torch.cat([torch.tensor([BLANK]), own_tokens]).to(rows.device)
        scores.append((rows[:, columns] - total).T)
        indices.append(index + 1)  # column 0 is the blank's
    # `pad_sequence` pads the first dimension only, here the columns. Positions are padded before it is
    # called.
    longest = max(positions)
    padded = nn.utils.rnn.pad_sequence(
        [functional.pad(s, (0, longest - s.shape[1])) for s in scores], batch_first=True
    )
    # The loss is computed on the CPU, because torch's gradient on a GPU adds in an order that varies: a
    # resumed training would differ in the last bits. These scores are small, so copying them is cheap.
    # See https://github.com/pytorch/pytorch/issues/17798.
    total_loss = functional.ctc_loss(
        # [utterances, columns, positions] → [positions, utterances, columns], the order that torch's CTC
        # expects.
        padded.permute(2, 0, 1).cpu(),
        torch.cat(indices),
        torch.tensor(positions),
        torch.tensor([len(t) for t in targets]),
        blank=0,
        reduction="sum",
        # Otherwise, an utterance that is too short for its tokens would make the step's loss infinite.
        zero_infinity=True,
    )
    return total_loss.to(logits.device)


def best_paths(logits: torch.Tensor, positions: list[int]) -> list[list[int]]:
    """Return CTC's best path of each utterance: token indices, without repetitions and blanks.

    Args:
        logits: [positions of all utterances, 1 + tokens].
        positions: number of positions of each utterance.
    """
    best = logits.argmax(1).cpu().split(positions)
    # Repetitions are merged before blanks are removed: only a blank separates two equal tokens.
    return [[int(t) for t in torch.unique_consecutive(path) if t != BLANK] for path in best]
