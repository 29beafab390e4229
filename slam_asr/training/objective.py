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
        logits: [targets, vocabulary], as `Slam` gives them.
        labels: [utterances, answer columns], `IGNORED` where there is no target.
    """
    logits, targets = logits.float(), labels[labels != IGNORED]
    # The sum over no target is zero with a zero gradient: a process without work steps with the others.
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    sums = torch.stack([loss.detach().double(), right.double(), torch.tensor(len(targets), device=loss.device).double()])
    return AnswerScores(loss, sums)
