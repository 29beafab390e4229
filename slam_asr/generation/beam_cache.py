"""The key-value cache of a beam search, whose beams share the keys and values of audio and prompt.

transformers' own cache contains audio and prompt once per beam. It copies all keys and values to append a
token, and copies them again whenever beams are reordered. But the beams of one utterance differ only in the
tokens that they generated. `SharedLayer` therefore caches the *prefix* (audio and prompt) once per utterance,
and `attend` reads it once for all beams of that utterance. `attend` is registered with transformers as an
attention implementation, because none of transformers' own implementations can take keys from two tensors
with different numbers of rows. For an LLM that does not use registered implementations, `BeamLayer` has one
row per beam, in a buffer that is allocated once.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import cast

import torch
from torch import nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ATTENTION = "slam_asr_shared_prefix"
"""Name under which `attend` is registered with transformers."""
_UPDATED: ContextVar["SharedLayer | None"] = ContextVar("updated layer", default=None)
"""The cache's layer that this thread updated last, in which `attend` finds the prefix."""


class CannotShare(Exception):
    """The LLM does not use `attend`, or needs something that `attend` does not compute.

    `beam_search` then repeats the search without a shared prefix.
    """


def is_plain(cache: Cache) -> bool:
    """Return whether every layer caches the keys and values of all positions.

    Layers with sliding windows drop positions, and recurrent layers have none. Neither kind of cache can be
    split by position.
    """
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def expand_for_beams(
    cache: DynamicCache, beams: int, max_new_tokens: int, mask: torch.Tensor | None
) -> DynamicCache:
    """Turn a cache with one row per utterance into one that serves `beams` rows per utterance.

    Args:
        cache: keys and values of audio and prompt, one row per utterance. Its layers are replaced, and the
            replaced layers no longer hold tensors.
        beams: number of adjacent rows that each utterance gets.
        max_new_tokens: capacity for generated tokens, in positions.
        mask: [utterances, positions] int64, 0 on padding, if the beams share the prefix; None for one copy of
            the prefix per beam.

    Returns:
        The same cache object.
    """
    padding_bias = None
    if mask is not None:
        first = cache.layers[0]
        assert isinstance(first, DynamicLayer) and first.keys is not None, "only plain caches are shared"
        # The lowest finite number gives probability 0, as -inf does, but no NaN in a row that is all padding.
        lowest = torch.finfo(first.keys.dtype).min
        padding_bias = first.keys.new_zeros(mask.shape).masked_fill_(mask == 0, lowest)[:, None, None]
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            # Another kind of layer, such as a sliding window, manages its own memory.
            cast(DynamicLayer, layer).batch_repeat_interleave(beams)
        elif padding_bias is not None:
            cache.layers[i] = SharedLayer(layer, beams, max_new_tokens, padding_bias)
        else:
            cache.layers[i] = BeamLayer(layer, beams, max_new_tokens)
    return cache


class BeamLayer(DynamicLayer):
    """The keys and values of one LLM layer, with one row per beam.

    `keys` and `values` are views [utterances · beams, key heads, positions, head width] of buffers. The
    buffers have capacity for all new tokens from the start, so that appending a token copies only that token.

    Args:
        layer: a layer with one row per utterance; its tensors are released.
        beams: number of rows that each utterance gets.
        max_new_tokens: maximum number of positions that can be appended.
    """

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer, beams: int, max_new_tokens: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None, "the LLM must process the prefix first"
        self.generated_from = layer.keys.shape[-2]
        """Position in the buffers at which generated tokens begin: 0 in a `SharedLayer`, whose buffers do not
        contain the prefix."""
        self._keys, self._values = (
            _with_capacity(tensor, beams, max_new_tokens) for tensor in (layer.keys, layer.values)
        )
        # Otherwise the prefix would be in memory twice until all layers are converted.
        layer.keys = layer.values = None
        self.dtype, self.device, self.is_initialized = self._keys.dtype, self._keys.device, True
        self._set_end(self.generated_from)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new positions.

        Args:
            key_states: [utterances · beams, key heads, new positions, head width].
            value_states: same shape as `key_states`.
            args: not used.
            kwargs: not used.

        Returns:
            Keys and values of all positions so far, each [utterances · beams, key heads, positions, head
            width].
        """
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        # transformers' own layer would concatenate here, and so copy all positions for every new one.
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self._set_end(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue any beam of the same utterance.

        Only the generated positions are copied, because all beams of an utterance have the same prefix.

        Args:
            beam_idx: [utterances · beams] int64: for each row, the row whose hypothesis it continues.
        """
        end = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            generated = buffer[:, :, self.generated_from : end]
            generated.copy_(generated.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Retain the rows `indices` [rows] int64, in ascending order. Others belong to settled utterances."""
        end = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            # Rows are moved within the buffer, so that no new one is allocated. The temporary copy on the
            # right has only the retained rows, without unused capacity.
            buffer[: len(indices), :, :end] = buffer[indices, :, :end]
        self._keys, self._values = self._keys[: len(indices)], self._values[: len(indices)]
        self._set_end(end)

    def _set_end(self, end: int) -> None:
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]


def _with_capacity(tensor: torch.Tensor, beams: int, max_new_tokens: int) -> torch.Tensor:
    """Copy [rows, heads, positions, width] to [rows · beams, heads, positions + max_new_tokens, width]."""
    rows, heads, positions, width = tensor.shape
    capacity = positions + max_new_tokens
    # The unused capacity may stay uninitialised: `keys` and `values` never reach beyond the last position.
    buffer = tensor.new_empty(rows * beams, heads, capacity, width)
    buffer.view(rows, beams, heads, capacity, width)[:, :, :, :positions] = tensor[:, None]
    return buffer


class SharedLayer(BeamLayer):
    """A `BeamLayer` for the generated tokens only, with the prefix cached once per utterance.

    Args:
        layer: a layer with one row per utterance; its tensors become the prefix.
        beams: number of rows that each utterance gets.
        max_new_tokens: maximum number of positions that can be appended.
        padding_bias: [utterances, 1, 1, positions] in the keys' dtype, added to the attention scores of the
            prefix: the dtype's lowest finite number on padding, else 0.
    """

    def __init__(
        self, layer: DynamicLayer, beams: int, max_new_tokens: int, padding_bias: torch.Tensor
    ) -> None:
        assert layer.keys is not None and layer.values is not None, "the LLM must process the prefix first"
        self.prefix_keys, self.prefix_values = layer.keys, layer.values
        """Keys and values of audio and prompt, each [utterances, key heads, positions, head width]."""
        self.padding_bias, self.beams = padding_bias, beams
        self.attend_calls = 0
        """Number of times that `attend` has read this layer. The search compares it with the number of steps
        to check that the LLM really uses `attend`."""
        # `BeamLayer` gets tensors with no positions, so its buffers hold only generated tokens.
        layer.keys, layer.values = (tensor[:, :, :0] for tensor in (layer.keys, layer.values))
        super().__init__(layer, beams, max_new_tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append as in `BeamLayer`, but return the keys and values of the generated tokens only.

        Arguments and results have the shapes of `BeamLayer.update`.
        """
        # transformers calls `attend` next, but passes it only keys and values. `attend` therefore finds this
        # layer in `_UPDATED`.
        _UPDATED.set(self)
        return super().update(key_states, value_states)

    def get_seq_length(self, *args: object) -> int:
        """Return the number of positions so far, including the prefix."""
        return self.prefix_keys.shape[-2] + self.keys.shape[-2]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Retain the rows `indices` [rows] int64: all beams of the utterances that are still searched."""
        super().batch_select_indices(indices)
        # An utterance's rows are adjacent, so the first row of each gives its number.
        utterances = indices[:: self.beams] // self.beams
        self.prefix_keys, self.prefix_values, self.padding_bias = (
            tensor[utterances] for tensor in (self.prefix_keys, self.prefix_values, self.padding_bias)
        )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: object,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one new position per beam to a shared prefix and to the beam's own tokens.

    The signature is the one with which transformers calls an attention implementation.

    Args:
        module: the LLM's attention layer; not used.
        query: [utterances · beams, heads, 1, head width].
        key: keys of the generated tokens from a `SharedLayer`, [utterances · beams, key heads, positions,
            head width].
        value: same shape as `key`.
        attention_mask: None, unless the LLM builds a mask of its own. transformers builds none, because no
            mask function is registered under this name. The layer's `padding_bias` masks padding.
        scaling: factor of the scores; 1 / √(head width) if None.
        dropout: ignored, since a search has no dropout.
        more: other arguments that an LLM passes to its attention.

    Returns:
        [utterances · beams, 1, heads, head width], and None in place of the probabilities.

    Raises:
        CannotShare: the keys come from another kind of layer, or the LLM requires a mask, several positions
            at once, or a change of the scores.
    """
    layer = _UPDATED.get()
    # The keys are compared by identity: an LLM that copies them between cache and attention (to rotate or
    # repeat them, say) would change the keys of the generated tokens, but not those of the prefix.
    if (
        layer is None
        or key is not layer.keys
        or attention_mask is not None
        or query.shape[-2] != 1
        or any(more.get(name) is not None for name in _UNSUPPORTED)
    ):
        raise CannotShare
    layer.attend_calls += 1
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return _attend(layer, query, key, value), None


def _attend(layer: SharedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute the output [utterances · beams, 1, heads, head width] of `attend`; `query` is scaled."""
    rows, heads, _, width = query.shape
    key_heads, beams, prefix = key.shape[1], layer.beams, layer.prefix_keys.shape[-2]

    # For each key head of an utterance, the queries of all beams and of all heads that share the key head are
    # the rows of one matrix. One product of this matrix reads the prefix from memory only once.
    def by_utterance(tensor: torch.Tensor) -> torch.Tensor:
        """[utterances · beams, key heads, n, …] → [utterances, key heads, beams · n, …]"""
        return tensor.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)

    def by_beam(tensor: torch.Tensor) -> torch.Tensor:
        """Invert `by_utterance`."""
        return tensor.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)

    # With g = heads / key heads, and b beams: query [utterances · b, key heads, g, head width]. Both scores
    # are [utterances, key heads, b · g, keys], so that they can be joined along the keys.
    query = query.view(rows, key_heads, heads // key_heads, width)
    prefix_scores = by_utterance(query) @ layer.prefix_keys.transpose(-1, -2) + layer.padding_bias
    token_scores = by_utterance(query @ key.transpose(-1, -2))
    # One softmax covers prefix and generated tokens, as if their keys were one tensor.
    probabilities = torch.cat([prefix_scores, token_scores], -1).softmax(-1, dtype=torch.float32)
    probabilities = probabilities.to(value.dtype)
    # The weighted sum of all values is the sum over the prefix, whose values the beams share, plus the sum
    # over each beam's own tokens.
    of_prefix = by_beam(probabilities[..., :prefix] @ layer.prefix_values)
    return (of_prefix + by_beam(probabilities[..., prefix:]) @ value).reshape(rows, 1, heads, -1)


_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask")
"""Optional arguments by which an LLM asks its attention to change the scores or to mask further positions.
`attend` does not support them."""


@functools.cache
def register_attention() -> None:
    """Make `attend` known to transformers under the name `ATTENTION`, once."""
    AttentionInterface.register(ATTENTION, attend)


@contextlib.contextmanager
def shared_prefix_attention(llm: PreTrainedModel) -> Iterator[None]:
    """Make an LLM use `attend` within the context."""
    register_attention()
    # Parts of an LLM may have their own configurations, and each layer looks up its attention in its own.
    # Several modules may share a configuration, so configurations are collected by id.
    found = (getattr(module, "config", None) for module in llm.modules())
    configs = {id(config): config for config in found if config is not None}.values()
    usual = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation = name
        _UPDATED.set(None)  # the last layer's tensors must not outlive the search
