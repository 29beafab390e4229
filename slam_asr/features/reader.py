"""Where a model's audio comes from: a feature store, or the audio files themselves.

Both tell an utterance's length before it is read, so that batches can be planned, and which shard it
lies in, so that a shard is fetched once an epoch; and both give what `Slam` takes. From files, the
encoder runs with the model, and the shards are those that a store of the same manifest would have: the
order of training is the same either way.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slam_asr.audio import load_utterance
from slam_asr.features.audio_source import samples_of
from slam_asr.features.index import first_of_each
from slam_asr.features.plan import plan_shards
from slam_asr.manifest import Utterance
from slam_asr.models.feature_dtype import bytes_a_frame

if TYPE_CHECKING:
    import torch

    from slam_asr.features.store import FeatureStore
    from slam_asr.models.encoder import EncoderSpec
    from slam_asr.models.frontend import Prepared
    from slam_asr.recipe import Features


class FeatureReader(Protocol):
    """What training and decoding want to know of audio."""

    def span(self, utterance: Utterance) -> int:
        """Length in encoder frames, by which LLM positions are counted."""

    def read(self, utterance: Utterance) -> "torch.Tensor | Prepared":
        """Encoder output [frames, width], or what the encoder takes."""

    def shards_of(self, addresses: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """[utterances] number of the shard that each lies in, from their addresses [utterances, 32] and samples."""

    def expect(self, shards: Iterable[int]) -> None:
        """Be told which shards are needed now and next; others may go."""


class StoreReader:
    """Reads a feature store."""

    def __init__(self, store: "FeatureStore") -> None:
        self.store = store

    def span(self, utterance: Utterance) -> int:
        """Length in encoder frames."""
        return self.store.span(utterance.audio_id)

    def read(self, utterance: Utterance) -> "torch.Tensor":
        """Encoder output [frames, width]."""
        return self.store.read(utterance.audio_id)

    def shards_of(self, addresses: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """[utterances] number of the shard that each lies in."""
        return self.store.index.columns["shard"][self.store.index.locate(addresses)]

    def expect(self, shards: Iterable[int]) -> None:
        """Let go of other shards, and fetch these ahead where the store is remote."""
        self.store.expect(shards)


class AudioReader:
    """Reads audio files.

    Args:
        spec: the encoder.
        options: of the store that there might be.
    """

    def __init__(self, spec: "EncoderSpec", options: "Features") -> None:
        self.spec, self.options = spec, options
        self._prepare = spec.preparer()

    def span(self, utterance: Utterance) -> int:
        """Length in encoder frames."""
        return self.spec.span_of(samples_of(utterance))

    def read(self, utterance: Utterance) -> "Prepared":
        """The audio as the encoder takes it."""
        return self._prepare(load_utterance(utterance))

    def shards_of(self, addresses: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """[utterances] number of the shard that each would lie in."""
        first, which = first_of_each(addresses)
        frame = bytes_a_frame(self.spec.width, self.options.dtype)
        sizes = [self.spec.frames_of(int(n)) * frame for n in samples[first]]
        numbers = np.zeros(len(first), np.int32)
        for number, piece in enumerate(plan_shards(sizes, self.options.shard_megabytes * 1_000_000)):
            numbers[piece] = number
        return numbers[which]

    def expect(self, shards: Iterable[int]) -> None:
        """Nothing to do: audio is read where it lies."""
