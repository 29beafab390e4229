"""What training minimises, and what it watches."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from slam_asr.models.slam import IGNORED


@dataclass
class AnswerScores:
    """Sums over the target tokens of a batch."""

    loss: torch.Tensor
    """Cross entropy, summed, in float32; has a gradient."""
    sums: torch.Tensor
    """[loss, right next tokens, target tokens] in float64, detached: can be added over batches and processes."""


def score_answers(logits: torch.Tensor, labels: torch.Tensor) -> AnswerScores:
    """Cross entropy and next-token accuracy on the answers.

    Args:
        logits: [utterances, answer columns, vocabulary].
        labels: [utterances, answer columns], `IGNORED` where there is no target.
    """
    wanted = labels != IGNORED
    chosen, targets = logits[wanted].float(), labels[wanted]
    # A batch without targets still needs a loss with a (zero) gradient: every process steps together.
    loss = functional.cross_entropy(chosen, targets, reduction="sum") if len(targets) else logits.float().sum() * 0.0
    right = (chosen.argmax(-1) == targets).sum()
    sums = torch.stack([loss.detach().double(), right.double(), torch.tensor(len(targets), device=loss.device).double()])
    return AnswerScores(loss, sums)
