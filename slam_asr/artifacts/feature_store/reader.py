"""Where a model's audio comes from: a feature store, or the audio files themselves.

Before an utterance is read, both readers know its length, so that batches can be planned, and its shard, so
that each shard is fetched once per epoch. Both return what `Slam` takes as input. With `AudioReader`, the
encoder runs as part of the model, and utterances are grouped into the shards that a store of the same
manifest would have. Training therefore takes utterances in the same order with either reader.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slam_asr.artifacts.feature_store.index import plan_shards, unique_audio_ids
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import load_utterance, samples_of
from slam_asr.models.feature_dtype import bytes_per_frame

if TYPE_CHECKING:
    import torch

    from slam_asr.artifacts.feature_store.store import FeatureStore
    from slam_asr.config.recipe import Features
    from slam_asr.models.encoders.base import EncoderSpec
    from slam_asr.models.encoders.frontend import Prepared


class FeatureReader(Protocol):
    """A source of audio for training and decoding."""

    def span(self, utterance: Utterance) -> int:
        """Length in encoder frames, from which LLM positions are computed."""

    def read(self, utterance: Utterance) -> "torch.Tensor | Prepared":
        """Encoder output [frames, width], or the encoder's input."""

    def shards_of(self, audio_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The shard that holds each utterance.

        Args:
            audio_ids: [utterances, 32] in bytes.
            samples: [utterances] lengths in samples at 16 kHz.

        Returns:
            [utterances] shard numbers.
        """

    def expect(self, shards: Iterable[int]) -> None:
        """Prepare to read these shards, which are needed now or next; all others may be released."""


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

    def shards_of(self, audio_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """[utterances] number of the shard that holds each utterance's features."""
        return self.store.index.columns["shard"][self.store.index.locate(audio_ids)]

    def expect(self, shards: Iterable[int]) -> None:
        """Prefetch these shards if the store is remote; release all others."""
        self.store.expect(shards)


class AudioReader:
    """Reads audio files.

    Args:
        spec: the encoder.
        options: settings of the feature store that the same manifest would have.
    """

    def __init__(self, spec: "EncoderSpec", options: "Features") -> None:
        self.spec, self.options = spec, options
        self._prepare = spec.preparer()

    def span(self, utterance: Utterance) -> int:
        """Length in encoder frames."""
        return self.spec.span_of(samples_of(utterance))

    def read(self, utterance: Utterance) -> "Prepared":
        """The audio as the encoder's input."""
        return self._prepare(load_utterance(utterance))

    def shards_of(self, audio_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """[utterances] number of the shard that would hold each utterance's features."""
        first, inverse = unique_audio_ids(audio_ids)
        frame_bytes = bytes_per_frame(self.spec.width, self.options.dtype)
        sizes = [self.spec.frames_of(int(n)) * frame_bytes for n in samples[first]]
        numbers = np.zeros(len(first), np.int32)
        for number, entries in enumerate(plan_shards(sizes, self.options.shard_megabytes * 1_000_000)):
            numbers[entries] = number
        return numbers[inverse]

    def expect(self, shards: Iterable[int]) -> None:
        """Do nothing: audio files are read in place."""
