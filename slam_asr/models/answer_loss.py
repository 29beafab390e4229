"""The training loss and the next-token accuracy, computed from all logits at once or in chunks.

The logits of a batch are large: 2,000 target tokens of an LLM with 128,000 vocabulary entries need 1 GB in
fp32, and their gradient needs as much again. `score_in_chunks` computes loss and gradient together for a few
targets at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

IGNORED = -100
"""Label of a position without a target: the default `ignore_index` of torch's cross entropy."""
CHUNK = 2**25
"""Number of logits in memory at a time: 128 MiB in fp32. A smaller number saves memory, but gives smaller and
slower matrix products."""


class AnswerScores(NamedTuple):
    """Sums over the target tokens of a batch."""

    loss: torch.Tensor
    """Scalar: summed cross entropy in float32, with a gradient."""
    sums: torch.Tensor
    """[3] float64, detached: loss, number of correct next tokens, number of target tokens. Sums of several
    batches may be added."""


def score_answers(logits: torch.Tensor, labels: torch.Tensor) -> AnswerScores:
    """Compute the cross entropy and the next-token accuracy on the answers.

    Args:
        logits: [targets, vocabulary], in the order of the targets in `labels`, as `Slam` returns them.
        labels: [rows, columns] int64 as in `Batch`: token ids at targets, `IGNORED` elsewhere.

    Returns:
        The sums over all targets.
    """
    logits, targets = logits.float(), labels[labels != IGNORED]
    # Without targets, the sum is zero and has a zero gradient, so a process without work still takes part in
    # the step.
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    correct = (logits.argmax(-1) == targets).sum()
    return AnswerScores(loss, _sums(loss, correct, targets))


def score_in_chunks(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the fields of `AnswerScores` from the output layer's inputs. This function is a `Scorer`.

    Only `CHUNK` logits are in memory at a time. The output layer is frozen, so only its inputs need a
    gradient. That gradient is computed along with the loss, and no logits are saved for the backward pass.

    Args:
        hidden: [targets, LLM width], inputs of the output layer in its dtype.
        head: the output layer; the LLM must not change its logits any further (see `allows_chunks`).
        targets: [targets] int64, token ids.

    Returns:
        Loss (scalar, float32, with a gradient) and sums ([3], float64), as in `AnswerScores`.
    """
    assert isinstance(head, nn.Linear)  # see `allows_chunks`
    loss, correct = _ChunkedLoss.apply(hidden, head.weight, head.bias, targets)
    return loss, _sums(loss, correct, targets)


def _sums(loss: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        # An epoch has many millions of tokens, and fp32 represents all integers only up to 2**24.
        [loss.detach().double(), correct.double(), torch.tensor(len(targets), device=loss.device).double()]
    )


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of a linear layer's outputs, with its gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # The weight is [vocabulary, LLM width], so `size` targets have at most `CHUNK` logits.
        size = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk = targets[start : start + size, None]
            logits = functional.linear(hidden[start : start + size], weight, bias).float()
            correct += (logits.argmax(-1, keepdim=True) == chunk).sum()
            total = logits.logsumexp(-1, keepdim=True)
            # -log softmax(logits)[target] = logsumexp(logits) - logits[target], for each target.
            loss += (total - logits.gather(-1, chunk)).sum()
            if gradient is not None:
                # d(loss)/d(logits) of the cross entropy is softmax(logits), minus 1 at the target. It
                # overwrites the logits, which nothing needs any more, so that no second chunk is allocated.
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(-1, chunk, torch.full_like(chunk, -1, dtype=probabilities.dtype))
                # logits = hidden @ weight.T + bias, so d(loss)/d(hidden) = d(loss)/d(logits) @ weight.
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[start : start + size])
        # None in validation, which has no backward pass.
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The saved gradient is that of the unscaled sum. `loss_gradient` is the factor by which the caller
        # scaled this sum, such as 1 / tokens or a loss scale. Weight, bias and targets have no gradient.
        return gradient * loss_gradient.to(gradient.dtype), None, None, None


def allows_chunks(llm: PreTrainedModel) -> bool:
    """Return whether `score_in_chunks` may be used with an LLM.

    The output layer must be frozen, and the LLM's logits must be exactly that layer's outputs: some LLMs
    scale or cap them. The output layer must not be in fp16, because the gradient is computed before the loss
    is scaled and could underflow.

    Args:
        llm: an LLM that can be called. If its weights are sharded, call this function within `Slam.try_llm`.
            This function may switch the LLM to evaluation mode, and does not switch it back.
    """
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head.weight.dtype == torch.float16:
        return False
    return gives_bare_logits(llm.eval())


@torch.no_grad()
def gives_bare_logits(llm: PreTrainedModel) -> bool:
    """Return whether an LLM's logits are its output layer's outputs, neither scaled nor capped.

    The LLM may be on the meta device, without values.
    """
    outputs: list[torch.Tensor] = []
    head = llm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        ids = torch.arange(4, device=llm.device)[None]
        logits = llm(inputs_embeds=llm.get_input_embeddings()(ids), use_cache=False).logits
    finally:
        hook.remove()
    if len(outputs) != 1 or outputs[0].shape != logits.shape:
        return False
    # On the meta device there are no values to compare, so both must be the same tensor. Elsewhere, the
    # logits may also be a cast copy of the outputs.
    return outputs[0] is logits or (not logits.is_meta and torch.equal(outputs[0].float(), logits.float()))
