"""Packing: several utterances in one row, each attending only to itself, without any padding.

A packed row [1, positions] differs from a plain row in two ways. Its position ids start at 0 again with every
utterance. Its attention mask is block-diagonal: causal within an utterance, and closed between utterances.
This mask of [positions, positions] is never built. transformers' models look up their attention function by
name, and this module registers one. The function cuts the row at the utterances' bounds and computes causal
attention for each piece; on a GPU, torch's variable-length kernel computes all pieces together. All other
layers work position by position and need no change.

Not every model passes on what the function needs, and some compute attention in a way of their own.
`allow_packing` therefore runs a trial: two short texts in one row must get the logits that each gets alone. A
model that fails the trial gets padded batches.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from torch.nn.attention import varlen
except ImportError:  # older versions of torch
    varlen = None  # type: ignore[assignment]

NAME = "slam_asr_packed"
"""Name under which the attention function is registered with transformers."""


class Lengths:
    """The number of positions of each utterance in a row, in an opaque object.

    torch.compile specialises on the contents of lists. Given a plain list, it would compile the layers again
    for every new number of utterances.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.values = list(lengths)


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments of an LLM's forward pass that a packed row needs along with its embeddings.

    Args:
        lengths: number of positions of each utterance, in order.
        device: device of the row.

    Returns:
        position_ids [1, positions] int64, lengths, and a placeholder attention_mask [1, 1, 1, 1].
    """
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "lengths": Lengths(lengths),
        # transformers uses a four-dimensional mask as it is. Without one, it would build [positions,
        # positions]. The attention function ignores the placeholder.
        "attention_mask": torch.zeros((1, 1, 1, 1), device=device),
    }


def allow_packing(llm: PreTrainedModel) -> bool:
    """Switch an LLM to the packing attention function, unless that changes the LLM's results.

    Args:
        llm: an LLM that can be called. If its weights are sharded, call this function within `Slam.try_llm`.
            This function may switch the LLM to evaluation mode, and does not switch it back.

    Returns:
        Whether packed rows may be used. If not, the LLM has its former attention function.
    """
    former = llm.config._attn_implementation
    # transformers chooses sdpa, torch's attention, for every class that supports it. An LLM with another
    # attention may compute something that sdpa cannot.
    if former != "sdpa":
        return False
    _register()
    llm.eval()  # dropout, such as that of adapters, would make the trial's results differ
    # A class may ignore the request and leave its configuration unchanged, hence the first condition.
    llm.set_attn_implementation(NAME)
    if llm.config._attn_implementation == NAME and _passes_trial(llm):
        return True
    llm.set_attn_implementation(former)
    return False


@torch.no_grad()
def _passes_trial(llm: PreTrainedModel) -> bool:
    """Return whether two short texts in one row get the logits that each gets alone."""
    embed = llm.get_input_embeddings()
    assert isinstance(embed.num_embeddings, int)
    # The texts differ in length and in tokens, so that the trial detects mixed-up positions and texts.
    texts = [(torch.arange(n, device=llm.device) * 7 + n) % embed.num_embeddings for n in (6, 9)]
    try:
        arguments = packed_arguments([6, 9], llm.device)
        packed = llm(inputs_embeds=embed(torch.cat(texts)[None]), use_cache=False, **arguments).logits
        alone = [llm(inputs_embeds=embed(text[None]), use_cache=False).logits for text in texts]
    # A model without `**kwargs` refuses `lengths` (TypeError), and `_attention` refuses changed scores
    # (ValueError). A model that uses the placeholder mask in code of its own may fail on its shape.
    except (TypeError, ValueError, RuntimeError):
        return False
    pairs = list(zip(packed.float().split([6, 9], dim=1), (logits.float() for logits in alone), strict=True))
    if packed.dtype == torch.float32:
        return all((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() for ours, theirs in pairs)
    # In half precision, a different rounding may change the logits of a text's first positions a lot, because
    # models have huge activations there. The median ignores these positions, but it does detect attention to
    # the other text, which would change most logits of the second text.
    return all((ours - theirs).abs().median() <= 0.1 * theirs.std() for ours, theirs in pairs)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: Lengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of packed and other batches, with the signature that transformers expects.

    In a packed row, each utterance attends only to itself. The shapes below are those of a packed row.

    Args:
        module: the LLM's attention layer.
        query: [1, heads, positions, head width].
        key: [1, key heads, positions, head width]; heads is a multiple of key heads.
        value: same shape as `key`.
        attention_mask: used only for batches that are not packed.
        lengths: number of positions of each utterance; None if the batch is not packed.
        kwargs: other arguments that the LLM passes: `dropout`, the probability that an attention weight is
            dropped; `scaling`, the factor of the scores, 1 / √(head width) if None; `sliding_window`.

    Returns:
        [1, positions, heads, head width], and None in place of the probabilities.

    Raises:
        ValueError: the LLM changes the scores in a way that torch's attention does not support. The trial
            catches this error.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("this attention changes its scores and cannot be packed")
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    # The variable-length kernel supports neither fp32 nor dropout.
    if not dropout and query.is_cuda and query.dtype != torch.float32 and varlen is not None:
        return _variable_length(query, key, value, lengths.values, scaling, window), None
    # `split` and not slices: the gradient of each slice would be a tensor as long as the row.
    sizes = lengths.values
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = [_one_utterance(q, k, v, scaling, window, dropout).transpose(1, 2) for q, k, v in pieces]
    return torch.cat(outputs, dim=1), None


def _one_utterance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Return the causal attention [1, heads, positions, head width] of one utterance.

    `dropout` exceeds 0 only if all of the LLM is trained.
    """
    positions = query.shape[2]
    # For utterances within the window's length, a sliding window equals plain causal attention, for which
    # faster kernels exist.
    band = _band(positions, window, query.device) if window and window < positions else None
    grouped = key.shape[1] != query.shape[1]
    # torch refuses a mask together with is_causal; the band is causal by itself.
    return functional.scaled_dot_product_attention(
        query, key, value, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
    )


def _band(positions: int, window: int, device: torch.device) -> torch.Tensor:
    """Return a mask [positions, positions] bool: each position sees itself and the `window` - 1 before it."""
    index = torch.arange(positions, device=device)
    distance = index[:, None] - index[None]
    return (distance >= 0) & (distance < window)


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention [1, positions, heads, head width] of all utterances with one kernel call."""
    # Queries and keys have the same bounds, so `starts` and `longest` are passed twice. `starts` also has the
    # end of the row.
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    longest = max(lengths)
    # The kernel takes [positions, heads, head width].
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    # Number of positions to the left and to the right that a position attends to. -1 means no limit.
    span = (window - 1 if window else -1, 0)
    output = varlen.varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=span, enable_gqa=True
    )
    assert isinstance(output, torch.Tensor), "a tuple only comes with return_aux"
    return output[None]


def exclude_from_compilation() -> None:
    """Exclude the attention function from torch.compile.

    The function's operations depend on the utterances' lengths, so torch would recompile it for many batches.
    """
    _register()
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))


@functools.cache
def _register() -> None:
    """Register the attention function, once: a later call must not undo `exclude_from_compilation`."""
    AttentionInterface.register(NAME, _attention)
    # Batches that are not packed get the masks that transformers builds for torch's attention.
    AttentionMaskInterface.register(NAME, sdpa_mask)
