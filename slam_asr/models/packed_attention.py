"""Several utterances one behind the other in a single row, each hearing itself alone: no position is padding.

transformers' models hand their attention to a function that is looked up by name. Ours takes the row apart
at the utterances' bounds and gives each to torch's own causal attention, which on a GPU is done at once where torch
has a form for it. Everything else in the model works position by position and never notices. A
model that does not hand on what the function needs, or attends in a way of its own, is found out by
trying, and gets padded batches.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from slam_asr.models.cpu_attention import causal_attention

NAME = "slam_asr_packed"
"""Of the attention function, among transformers' own."""


class Lengths:
    """Positions of each utterance of a row, as one thing: a compiler that saw into it would compile for every other number of utterances anew."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.values = list(lengths)


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What an LLM gets besides the embeddings of a row.

    Args:
        lengths: positions of each utterance, in order.
        device: of the row.
    """
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "lengths": Lengths(lengths),
        # A mask that is there already is made no other; the attention has no use for it.
        "attention_mask": torch.zeros((1, 1, 1, 1), device=device),
    }


def allow_packing(llm: PreTrainedModel) -> bool:
    """Give an LLM the attention function, if it computes the same with it.

    The LLM must have its weights, whole.
    """
    before = llm.config._attn_implementation
    if before != "sdpa":
        return False
    llm.eval()  # adapters have dropout
    llm.set_attn_implementation(NAME)
    if llm.config._attn_implementation == NAME and _agrees(llm):
        return True
    llm.set_attn_implementation(before)
    return False


@torch.no_grad()
def _agrees(llm: PreTrainedModel) -> bool:
    """Whether two short texts in a row have the logits that each has by itself."""
    vocabulary = llm.get_input_embeddings().num_embeddings
    texts = [(torch.arange(n, device=llm.device) * 7 + n) % vocabulary for n in (6, 9)]
    embed = llm.get_input_embeddings()
    try:
        row = llm(
            inputs_embeds=embed(torch.cat(texts)[None]),
            use_cache=False,
            **packed_arguments([6, 9], llm.device),
        ).logits
        alone = [llm(inputs_embeds=embed(text[None]), use_cache=False).logits for text in texts]
    except (TypeError, ValueError, RuntimeError):
        return False
    pairs = list(zip(row.float().split([6, 9], dim=1), (logits.float() for logits in alone), strict=True))
    if row.dtype == torch.float32:
        return all((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() for ours, theirs in pairs)
    # In half precision single positions may differ by much, for any change of rounding: the first ones of a
    # text, on which models put huge values. Another text's words would change most logits of the second.
    return all((ours - theirs).abs().median() <= 0.1 * theirs.std() for ours, theirs in pairs)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: Lengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, positions, head width] of queries; keys and values with as many heads or fewer → [1, positions, heads, head width]."""
    if lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention of a kind that is not packed")
    window = kwargs.get("sliding_window")
    bounds = [0, *accumulate(lengths.values)]
    if not dropout and query.is_cuda and query.dtype != torch.float32 and _varlen is not None:
        return _at_once(query, key, value, bounds, max(lengths.values), scaling, window), None
    outputs = [
        _alone(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling, window, dropout).transpose(1, 2)
        for a, b in pairwise(bounds)
    ]
    return torch.cat(outputs, dim=1), None


def _alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """The attention of one utterance; dropout is of an LLM that is trained whole."""
    positions = query.shape[2]
    banded = bool(window) and window < positions
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not banded and not dropout:
        return causal_attention(query[0], key[0], value[0], scaling)[None]
    mask = {"attn_mask": _band(positions, window, query.device)} if banded else {"is_causal": True}
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1], **mask
    )


def _band(positions: int, window: int, device: torch.device) -> torch.Tensor:
    """[positions, positions] bool: each sees itself and the `window` - 1 before it."""
    at = torch.arange(positions, device=device)
    back = at[:, None] - at[None]
    return (back >= 0) & (back < window)


try:
    from torch.nn.attention.varlen import varlen_attn as _varlen
except ImportError:
    _varlen = None


def _at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    starts = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    return _varlen(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=True,
    )[None]


def leave_to_python() -> None:
    """Keep torch.compile out of the attention function: what it does depends on each batch's utterances."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
