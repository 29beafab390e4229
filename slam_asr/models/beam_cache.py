"""Keys and values of a beam search, whose beams share what stands before the answer.

transformers' own cache is copied as a whole at each token, to make room for it, and again as a whole when beams take each other's places. But
the beams of an utterance differ in the answer alone: audio and prompt, which are most of it, stay where they are, and room for the
answer is there from the beginning.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def for_beams(cache: DynamicCache, beams: int, room: int) -> DynamicCache:
    """Let a cache of utterances serve their beams.

    Args:
        cache: of audio and prompt, one row an utterance; taken apart.
        beams: rows that each utterance gets, one after the other.
        room: positions that may follow.
    """
    cache.layers = [BeamLayer(layer, beams, room) if type(layer) is DynamicLayer else _repeated(layer, beams) for layer in cache.layers]
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

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
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
            buffer[:, :, self.shared : end] = buffer[:, :, self.shared : end].index_select(0, beam_idx.to(buffer.device))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows: those of utterances that are still searched."""
        end = self.keys.shape[-2]
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show(end)

    def _show(self, end: int) -> None:
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]


def _with_room(tensor: torch.Tensor, beams: int, room: int) -> torch.Tensor:
    rows, heads, positions, width = tensor.shape
    buffer = tensor.new_empty(rows * beams, heads, positions + room, width)
    buffer.view(rows, beams, heads, positions + room, width)[:, :, :, :positions] = tensor[:, None]
    return buffer
