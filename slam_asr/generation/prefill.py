"""The LLM's forward pass in a search, and the prefill: the first pass, over audio and prompt."""

import inspect
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from slam_asr.generation.beam_cache import is_plain

PREFILL_POSITIONS = 4096
"""Maximum number of positions of audio and prompt in one forward pass. It is large enough to occupy a GPU,
and small enough that the utterances of a group have similar lengths. A single utterance may exceed it, and so
may a batch whose cache cannot be gathered from groups."""


def forward(
    llm: PreTrainedModel, positions: torch.Tensor, mask: torch.Tensor, **inputs: object
) -> tuple[torch.Tensor, object]:
    """Run the LLM.

    Args:
        llm: any causal LM.
        positions: [rows, new positions] int64, position ids; used if the LLM accepts them.
        mask: [rows, all positions] int64, 0 on padding and else 1.
        inputs: for the prefill, `inputs_embeds` [rows, new positions, LLM width]; for each generated token,
            `input_ids` [rows, new positions] int64, and the cache as `past_key_values`.

    Returns:
        Logits [rows, vocabulary] of the last position in fp32, and the cache.
    """
    # Not every family accepts `position_ids` and `logits_to_keep`.
    accepted = inspect.signature(llm.forward).parameters
    optional = {"position_ids": positions, "logits_to_keep": 1}
    inputs |= {name: value for name, value in optional.items() if name in accepted}
    output = llm(attention_mask=mask, use_cache=True, **inputs)
    # The logits are in fp32, because the search compares sums of log probabilities that differ by 1e-4, far
    # below the resolution of bf16. LLMs with recurrent layers return their state under another name, so their
    # cache is None.
    return output.logits[:, -1].float(), getattr(output, "past_key_values", None)


def prefill(
    llm: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, object]:
    """Run audio and prompt through the LLM.

    A large batch is divided into groups of similar length, longest first. Each group is padded only to its
    own longest utterance. The groups' keys and values are then gathered in one cache, aligned on the right.

    Args:
        llm: any causal LM.
        embeddings: [utterances, positions, LLM width], padded on the left.
        mask: [utterances, positions] int64, 0 on padding and else 1.

    Returns:
        Logits [utterances, vocabulary] of the first generated token, and the cache of all utterances.
    """

    def run_group(rows: torch.Tensor | slice, longest: int) -> tuple[torch.Tensor, object]:
        # The batch is padded on the left, so an utterance of the group has nothing but padding in the columns
        # that are cut off.
        group_mask = mask[rows, width - longest :]
        group_positions = (group_mask.cumsum(1) - 1).clamp(min=0)
        return forward(llm, group_positions, group_mask, inputs_embeds=embeddings[rows, width - longest :])

    utterances, width = mask.shape
    if utterances * width <= PREFILL_POSITIONS:
        return run_group(slice(None), width)
    # The order is longest first, so that a group's first utterance gives its padded length, and the pass with
    # the longest utterances runs before the cache of all utterances is allocated.
    lengths, order = mask.sum(1).sort(descending=True)
    logits: list[torch.Tensor] = []
    complete: DynamicCache | None = None
    start = 0
    while start < utterances:
        longest = int(lengths[start])
        rows = order[start : start + max(1, PREFILL_POSITIONS // longest)]
        group_logits, cache = run_group(rows, longest)
        if not is_plain(cache):
            # The caches of sliding windows and recurrent layers cannot be gathered by position, so the batch
            # runs in one pass.
            return run_group(slice(None), width)
        complete = _gather(complete, cast(DynamicCache, cache), rows, mask.shape)
        logits.append(group_logits)
        start += len(rows)
    # Logits were collected in the groups' order; `argsort` inverts it. The cache was filled by row index.
    return torch.cat(logits)[order.argsort()], complete


def _gather(
    complete: DynamicCache | None, group: DynamicCache, rows: torch.Tensor, shape: torch.Size
) -> DynamicCache:
    """Copy a group's keys and values to the cache of all utterances, aligned on the right.

    Args:
        complete: the cache of all utterances; None for the first group, whose cache object becomes it.
        group: a plain cache of the group, padded to the group's longest utterance.
        rows: [group's utterances] int64: their rows in the batch.
        shape: utterances and positions of the batch.

    Returns:
        The cache of all utterances.
    """
    utterances, width = shape
    result = group if complete is None else complete
    for full, part in zip(result.layers, group.layers, strict=True):
        for name in ("keys", "values"):
            states = getattr(part, name)
            if complete is None:
                # The cache must not be uninitialised: masked positions still enter products, and a NaN there
                # would reach the output.
                setattr(full, name, states.new_zeros(utterances, states.shape[1], width, states.shape[3]))
            getattr(full, name)[rows, :, width - states.shape[2] :] = states
    return result
