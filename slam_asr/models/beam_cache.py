"""Keys and values of a beam search, whose beams share what stands before the answer.

transformers' own cache holds audio and prompt once for each beam, is copied as a whole at each token, to make room for it, and again as a whole
when beams take each other's places. But the beams of an utterance differ in the answer alone. `SharedLayer` keeps the rest once an utterance, and
`attend` reads it once for all of its beams; it is registered with transformers as a kind of attention. Where an LLM has an attention of its own, `BeamLayer`
keeps one row a beam, as that needs it.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ATTENTION = "beams_share_what_they_heard"
"""Name of our kind among transformers' implementations of attention."""


class CannotShare(Exception):
    """The LLM attends in a way that `attend` does not know."""


def is_plain(cache: object) -> bool:
    """Whether every layer keeps keys and values of all positions."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def for_beams(cache: DynamicCache, beams: int, room: int, mask: torch.Tensor | None) -> DynamicCache:
    """Let a cache of utterances serve their beams.

    Args:
        cache: of audio and prompt, one row an utterance; taken apart.
        beams: rows that each utterance gets, one after the other.
        room: positions that may follow.
        mask: [utterances, positions], 0 where there is padding, if the beams are to share what stands before the answer.
    """
    if mask is not None:
        dtype = cache.layers[0].keys.dtype
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            mask == 0, torch.finfo(dtype).min
        )[:, None, None]
        cache.layers = [SharedLayer(layer, beams, room, hidden) for layer in cache.layers]
    else:
        cache.layers = [
            BeamLayer(layer, beams, room) if type(layer) is DynamicLayer else _repeated(layer, beams)
            for layer in cache.layers
        ]
    return cache


def _repeated(layer: DynamicLayer, beams: int) -> DynamicLayer:
    layer.batch_repeat_interleave(beams)
    return layer


class BeamLayer(DynamicLayer):
    """One layer's keys and values: [utterances · beams, key heads, positions, head width], views of buffers with room behind them."""

    is_croppable = False

    def __init__(self, layer: DynamicLayer, beams: int, room: int) -> None:
        super().__init__()
        self.shared = layer.keys.shape[-2]
        self._keys, self._values = (_with_room(tensor, beams, room) for tensor in (layer.keys, layer.values))
        layer.keys = layer.values = None
        self.dtype, self.device, self.is_initialized = self._keys.dtype, self._keys.device, True
        self._show(self.shared)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append → all keys and values."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self._show(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the answer of another of the same utterance."""
        end = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            buffer[:, :, self.shared : end] = buffer[:, :, self.shared : end].index_select(
                0, beam_idx.to(buffer.device)
            )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows: those of utterances that are still searched."""
        end = self.keys.shape[-2]
        for buffer in (self._keys, self._values):
            # Within the same memory, and no room that nothing stands in yet.
            buffer[: len(indices), :, :end] = buffer[indices, :, :end]
        self._keys, self._values = self._keys[: len(indices)], self._values[: len(indices)]
        self._show(end)

    def _show(self, end: int) -> None:
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]


def _with_room(tensor: torch.Tensor, beams: int, room: int) -> torch.Tensor:
    rows, heads, positions, width = tensor.shape
    buffer = tensor.new_empty(rows * beams, heads, positions + room, width)
    buffer.view(rows, beams, heads, positions + room, width)[:, :, :, :positions] = tensor[:, None]
    return buffer


class SharedLayer(BeamLayer):
    """The same of the answers alone; what stands before them is kept once an utterance.

    Args:
        layer: one row an utterance.
        beams: rows that each utterance gets.
        room: positions that may follow.
        hidden: [utterances, 1, 1, positions], what is added to the scores of what stands before: far below zero where there is padding.
    """

    def __init__(self, layer: DynamicLayer, beams: int, room: int, hidden: torch.Tensor) -> None:
        self.before_keys, self.before_values, self.hidden, self.beams = (
            layer.keys,
            layer.values,
            hidden,
            beams,
        )
        self.attended = 0
        """Positions for which `attend` was called."""
        layer.keys, layer.values = (tensor[:, :, :0] for tensor in (layer.keys, layer.values))
        super().__init__(layer, beams, room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append → keys and values of the answers, by which `attend` finds the others."""
        keys, values = super().update(key_states, value_states)
        keys = keys.view_as(keys)
        keys.of_layer = self
        return keys, values

    def get_seq_length(self, *args: object) -> int:
        """Positions so far, with those before the answer."""
        return self.before_keys.shape[-2] + self.keys.shape[-2]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows: all beams of utterances that are still searched."""
        super().batch_select_indices(indices)
        utterances = indices[:: self.beams] // self.beams
        self.before_keys, self.before_values, self.hidden = (
            tensor[utterances] for tensor in (self.before_keys, self.before_values, self.hidden)
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
    """Attention of one new position of each beam, as transformers asks for it.

    Args:
        module: the LLM's layer of attention.
        query: [utterances · beams, heads, 1, head width].
        key: of the answers, from a `SharedLayer`: [utterances · beams, key heads, positions, head width].
        value: as `key`.
        attention_mask: none: what the layer keeps says it.
        scaling: of the scores.
        dropout: there is none in a search.
        more: what other LLMs do to their scores.

    Returns:
        [utterances · beams, 1, heads, head width], and no probabilities.

    Raises:
        CannotShare: the LLM wants something else.
    """
    layer = getattr(key, "of_layer", None)
    if (
        layer is None
        or attention_mask is not None
        or query.shape[-2] != 1
        or any(more.get(name) is not None for name in _OTHER_SCORES)
    ):
        raise CannotShare
    layer.attended += 1
    rows, heads, _, width = query.shape
    groups, beams, before = key.shape[1], layer.beams, layer.before_keys.shape[-2]

    def together(of_rows: torch.Tensor) -> torch.Tensor:
        """The heads that share a key head, of all beams of an utterance: [utterances, key heads, beams · heads each, …]."""
        return of_rows.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)

    def apart(of_utterances: torch.Tensor) -> torch.Tensor:
        """Back again: [utterances · beams, key heads, heads each, …]."""
        return of_utterances.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)

    query = (query * (width**-0.5 if scaling is None else scaling)).view(rows, groups, heads // groups, width)
    of_before = together(query) @ layer.before_keys.transpose(-1, -2) + layer.hidden
    of_answers = together(query @ key.transpose(-1, -2))
    probabilities = torch.cat([of_before, of_answers], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    output = (
        apart(probabilities[..., :before] @ layer.before_values) + apart(probabilities[..., before:]) @ value
    )
    return output.reshape(rows, 1, heads, -1), None


_OTHER_SCORES = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask")
"""What some LLMs give to their attention beside queries, keys and values."""
AttentionInterface.register(ATTENTION, attend)


@contextlib.contextmanager
def beams_share(llm: PreTrainedModel) -> Iterator[None]:
    """Have an LLM use `attend` meanwhile."""
    configs = {
        id(module.config): module.config for module in llm.modules() if hasattr(module, "config")
    }.values()
    usual = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation = name
