"""The base classes of speech encoders, which turn each utterance's waveform into features [frames, width].

All supported encoders compute 50 frames per second: one frame per 320 samples at 16 kHz. This module contains
the code that they share. The modules `whisper` and `waveform` contain the two families of encoders, and
`registry` selects one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from slam_asr.audio import SAMPLE_RATE
from slam_asr.config.recipe import Encoder
from slam_asr.models.encoders.frontend import Prepared, Preparer
from slam_asr.models.feature_dtype import round_trip
from slam_asr.models.grouping import padded_batches
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.model_files import weights_sha256
from slam_asr.pretrained.weight_checks import require_weights

SAMPLES_PER_FRAME = 320
"""Number of samples per frame at 16 kHz. For Whisper, this is the spectrogram's hop of 160 times a
convolution's stride of 2; for the other encoders, the product of their convolutions' strides."""


@dataclass
class EncoderSpec(ABC):
    """Describes an encoder without loading its weights."""

    folder: Path
    config: PretrainedConfig
    options: Encoder

    @property
    def width(self) -> int:
        """Number of values per frame (d_enc)."""
        return self.config.hidden_size

    @property
    def window_samples(self) -> int | None:
        """Length of the fixed input window in samples at 16 kHz; None if the encoder has no such window."""
        return None

    @abstractmethod
    def frames_of(self, samples: int) -> int:
        """Return the number of frames of an utterance of `samples` samples at 16 kHz."""

    def span_of(self, samples: int) -> int:
        """Return the length in frames from which an utterance's number of LLM positions is computed.

        The length equals `frames_of`, or is one more if a last frame would need samples beyond the end: the
        reference implementation counts this frame when it reserves positions.
        """
        return self.frames_of(samples)

    def seconds_of(self, samples: int) -> float:
        """Return how many seconds of input the encoder processes for an utterance, padding included."""
        return samples / SAMPLE_RATE

    def is_too_long(self, samples: int) -> bool:
        """Return whether an utterance of `samples` samples at 16 kHz is longer than the window, if any."""
        return self.window_samples is not None and samples > self.window_samples

    def count_parameters(self) -> int:
        """Count the parameters without loading the weights."""
        # On the meta device a model has shapes but no memory.
        with torch.device("meta"):
            model = AutoModel.from_config(self.config, trust_remote_code=False)
            return sum(p.numel() for p in self.encoder_of(model).parameters())

    def require_weights(self) -> None:
        """Check that the weights can be loaded, without reading their values.

        Raises:
            ModelError: a file is missing or damaged, or does not fit config.json.
        """
        require_weights(AutoModel, self.folder, "encoder")

    def encoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the part of the checkpoint's model that encodes speech."""
        return model

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that determines the output: weights, preprocessing, and which frames are used."""
        # The digest is of the weights' content, not of their path: a copy elsewhere finds the same features.
        return {"weights_sha256": weights_sha256(self.folder), **self.preprocessing()}

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Return the options that change the output, in addition to the weights."""

    @abstractmethod
    def preparer(self) -> Preparer:
        """Return a picklable function from a waveform to the encoder's input, for use in other processes."""

    @abstractmethod
    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "SpeechEncoder":
        """Load the encoder with frozen weights.

        Raises:
            ModelError: weights are missing, damaged, or not finite.
        """


class SpeechEncoder(nn.Module, ABC):
    """An encoder with its weights.

    Args:
        spec: description of the encoder, from `describe_encoder`.
        dtype: dtype of weights and activations.
        device: device on which the encoder runs.
    """

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        self.model = spec.encoder_of(load_weights(AutoModel, spec.folder, dtype, "encoder")).to(device)
        self.prepare = spec.preparer()
        """Function from a waveform [samples] at 16 kHz in float32 to an input of `forward`."""

    @abstractmethod
    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Encode a batch of utterances of any lengths.

        Args:
            utterances: the utterances as `prepare` returns them.

        Returns:
            A tensor [frames, width] per utterance, in the weights' dtype. The other utterances of the batch
            affect only the rounding of its values.
        """

    @torch.inference_mode()
    def encode(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Call `forward` without gradients. Returns one tensor [frames, width] per utterance."""
        return self(utterances)


def encode_audio(
    encoder: SpeechEncoder | None, audio: list[torch.Tensor | Prepared], saved_as: str | None
) -> list[torch.Tensor]:
    """Encode utterances; features are returned unchanged.

    Args:
        encoder: may be None if `audio` holds features.
        audio: one entry per utterance, features [frames, encoder width] or the encoder's input; all of one
            kind.
        saved_as: dtype of saved features. A frozen encoder's outputs are rounded to it, so that they equal
            features read from a feature store. None for a trained encoder, whose outputs need gradients and
            are never saved.

    Returns:
        Features, each [frames, encoder width], in the same order.
    """
    if encoder is None or isinstance(audio[0], torch.Tensor):
        return cast(list[torch.Tensor], audio)
    prepared = cast(list[Prepared], audio)
    seconds = [encoder.spec.seconds_of(a.samples) for a in prepared]
    groups = [
        [prepared[i] for i in group] for group in padded_batches(seconds, encoder.spec.options.batch_seconds)
    ]
    if saved_as is None:
        return [features for group in groups for features in encoder(group)]
    # A frozen encoder's activations would otherwise be retained for a backward pass that never reaches them.
    with torch.no_grad():
        return [round_trip(features, saved_as) for group in groups for features in encoder(group)]
