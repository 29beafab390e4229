"""What training minimises, and what it watches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from slam_asr.models.slam import IGNORED

CHUNK = 2**25
"""Logits that are there at a time: 128 MiB in fp32."""


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
    return AnswerScores(loss, _sums(loss, right, targets))


def score_in_chunks(
    rows: torch.Tensor, head: nn.Linear, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the output layer's inputs, with few logits at a time: a `Scorer`.

    The output layer is frozen, so that its inputs' gradient is all that is wanted; it is computed along with
    the loss, and no logit is kept for the way back.

    Args:
        rows: [targets, LLM width].
        head: the LLM's output layer, behind which it does nothing to logits.
        targets: [targets] token ids.

    Returns:
        The fields of `AnswerScores`.
    """
    loss, right = _ChunkedLoss.apply(rows, head.weight, head.bias, targets)
    return loss, _sums(loss, right, targets)


def _sums(loss: torch.Tensor, right: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [loss.detach().double(), right.double(), torch.tensor(len(targets), device=loss.device).double()]
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        right = torch.zeros((), dtype=torch.int64, device=rows.device)
        gradient = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(rows), size):
            wanted = targets[start : start + size, None]
            logits = functional.linear(rows[start : start + size], weight, bias).float()
            right += (logits.argmax(-1, keepdim=True) == wanted).sum()
            total = logits.logsumexp(-1, keepdim=True)
            loss += (total - logits.gather(-1, wanted)).sum()
            if gradient is not None:
                # The derivative of the cross entropy: probabilities, less one where the target is.
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=probabilities.dtype))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[start : start + size])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss.to(gradient.dtype), None, None, None


@torch.no_grad()
def allows_chunks(llm: PreTrainedModel) -> bool:
    """Whether an LLM's logits are its output layer's outputs and nothing else, and that layer is frozen.

    The LLM must have its weights, whole. In fp16 a gradient that is not scaled yet could vanish.
    """
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head.weight.dtype == torch.float16:
        return False
    seen: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        ids = torch.arange(4, device=llm.device)[None]
        logits = llm.eval()(inputs_embeds=llm.get_input_embeddings()(ids), use_cache=False).logits
    finally:
        hook.remove()
    return len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0].float(), logits.float())
