"""Speech encoders: they turn each utterance's waveform into a tensor [frames, width].

All supported encoders compute 50 frames per second: one frame per 320 samples at 16 kHz. This module contains
what they share; the modules `whisper` and `waveform` contain the two families, and `registry` selects one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from slam_asr.audio import SAMPLE_RATE
from slam_asr.config.recipe import Encoder
from slam_asr.models.encoders.frontend import Prepared, Preparer
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import weights_sha256

SAMPLES_PER_FRAME = 320
"""Samples at 16 kHz per frame. Whisper: the spectrogram's hop of 160 times a convolution's stride of 2.
The others: the product of their convolutions' strides."""


@dataclass
class EncoderSpec(ABC):
    """Describes an encoder without loading its weights."""

    folder: Path
    config: PretrainedConfig
    options: Encoder

    @property
    def width(self) -> int:
        """d_enc: number of values per frame."""
        return self.config.hidden_size

    @property
    def window_samples(self) -> int | None:
        """Length in samples at 16 kHz of the fixed input window, or None if the encoder has none."""
        return None

    @abstractmethod
    def frames_of(self, samples: int) -> int:
        """Number of frames of an utterance of `samples` samples at 16 kHz."""

    def span_of(self, samples: int) -> int:
        """Length of an utterance in frames, from which its number of LLM positions is computed.

        It equals `frames_of`, or is one more if the encoder's last frame would need samples beyond the end:
        the reference implementation reserves that frame's position anyway.
        """
        return self.frames_of(samples)

    def seconds_of(self, samples: int) -> float:
        """Seconds of input that the encoder processes for an utterance, including the padding of windows."""
        return samples / SAMPLE_RATE

    def is_too_long(self, samples: int) -> bool:
        """Whether an utterance of `samples` samples at 16 kHz is longer than the window."""
        return self.window_samples is not None and samples > self.window_samples

    def count_parameters(self) -> int:
        """Count the parameters without loading the weights."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.encoder_of(AutoModel.from_config(self.config)).parameters())

    def encoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The part of the checkpoint's model that encodes speech."""
        return model

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the output: weights, preprocessing, and which frames are used."""
        return {"weights_sha256": weights_sha256(self.folder), **self.preprocessing()}

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """Options outside the weights that change the output."""

    @abstractmethod
    def preparer(self) -> Preparer:
        """A picklable function from a waveform to the encoder's input, for use in other processes."""

    @abstractmethod
    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "SpeechEncoder":
        """Load the encoder with frozen weights.

        Raises:
            ModelError: weights are missing, damaged, or not finite.
        """


class SpeechEncoder(nn.Module, ABC):
    """An encoder with its weights.

    Args:
        spec: from `describe_encoder`.
        dtype: of weights and activations.
        device: where it runs.
    """

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.spec = spec
        self.model = spec.encoder_of(load_weights(AutoModel, spec.folder, dtype, "encoder")).to(device)
        self.prepare = spec.preparer()
        """Function from a waveform [samples] at 16 kHz in float32 to an input of `forward`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Encode a batch of utterances of any lengths.

        Args:
            utterances: from `prepare`.

        Returns:
            A tensor [frames, width] per utterance, with the values that it has when it is encoded alone.
        """

    @torch.inference_mode()
    def encode(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Call `forward` without gradients: one [frames, width] tensor per utterance."""
        return self(utterances)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device


def batches_of(seconds: Sequence[float], budget: float) -> list[list[int]]:
    """Group utterances into batches for an encoder, without reordering them.

    Args:
        seconds: of input that the encoder processes for each utterance.
        budget: maximum seconds per batch. Because of padding every utterance counts as long as the batch's
            longest one. Only a single utterance that is longer by itself may exceed the budget.

    Returns:
        The utterances' indices in each batch.
    """
    batches: list[list[int]] = []
    longest = 0.0
    for index, length in enumerate(seconds):
        longest = max(longest, length)
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches
