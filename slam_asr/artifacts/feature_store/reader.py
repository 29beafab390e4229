"""Two sources of a model's audio: a feature store, or the audio files themselves.

`FeatureStore` and `AudioReader` share `span`, `read`, `shards_of` and `expect`. Both know the length of an
utterance before it is read, so that batches can be planned. They also know its shard, so that each shard is
fetched only once per epoch. Both return what `Slam` takes as input. With `AudioReader`, the encoder runs as
part of the model, and utterances are grouped into the shards that a store of the same manifest would have.
Training therefore takes utterances in the same order with either reader.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Union

import numpy as np

from slam_asr.artifacts.feature_store.index import plan_shards, unique_audio_ids
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import load_utterance, samples_of
from slam_asr.models.feature_dtype import bytes_per_frame

if TYPE_CHECKING:
    from slam_asr.artifacts.feature_store.store import FeatureStore
    from slam_asr.config.recipe import Features
    from slam_asr.models.encoders.base import EncoderSpec
    from slam_asr.models.encoders.frontend import Prepared


class AudioReader:
    """Reads audio files, which the encoder then encodes as part of the model.

    Args:
        spec: the description of the encoder.
        options: the recipe's section `features`, with the dtype and shard size that a store would have.
    """

    def __init__(self, spec: "EncoderSpec", options: "Features") -> None:
        self.spec, self.options = spec, options
        self._prepare = spec.preparer()

    def span(self, utterance: Utterance) -> int:
        """Return the length in encoder frames."""
        return self.spec.span_of(samples_of(utterance))

    def read(self, utterance: Utterance) -> "Prepared":
        """Decode the audio and convert it to the encoder's input."""
        return self._prepare(load_utterance(utterance))

    def shards_of(self, audio_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the number of the shard that would contain each utterance's features in a store.

        Args:
            audio_ids: uint8 [utterances, 32].
            samples: int [utterances], lengths in samples at 16 kHz, which give the sizes of the features.

        Returns:
            int32 [utterances].
        """
        # As in an extraction, features are sorted by audio id, and equal audio is saved only once.
        first, inverse = unique_audio_ids(audio_ids)
        frame_bytes = bytes_per_frame(self.spec.width, self.options.dtype)
        # `features.plan` plans shards with the same sizes. Other sizes would give other shards.
        sizes = [self.spec.frames_of(int(n)) * frame_bytes for n in samples[first]]
        numbers = np.zeros(len(first), np.int32)
        for number, entries in enumerate(plan_shards(sizes, self.options.shard_megabytes * 1_000_000)):
            numbers[entries] = number
        return numbers[inverse]

    def expect(self, shards: Iterable[int]) -> None:
        """Do nothing, because audio files are not prefetched."""


FeatureReader = Union["FeatureStore", "AudioReader"]
"""A source of the model's audio, for training and decoding."""
