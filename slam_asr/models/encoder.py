"""Speech encoders: waveforms in, one [frames, width] tensor an utterance out.

Every encoder here gives 50 frames a second, that is one frame for 320 samples at 16 kHz. This module
holds what they share, and chooses by the checkpoint's own configuration; `whisper` and `waveform`
hold the two families.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from slam_asr.audio import SAMPLE_RATE
from slam_asr.configuration import one_sentence
from slam_asr.errors import UserError
from slam_asr.models.frontend import Prepared, Preparer
from slam_asr.models.pretrained import locate_model, weights_sha256
from slam_asr.models.weights import load_weights
from slam_asr.recipe import Encoder

SAMPLES_PER_FRAME = 320
"""At 16 kHz: Whisper's hop of 160 samples times its convolution's stride of 2; the product of the others' strides."""


@dataclass
class EncoderSpec(ABC):
    """What is known of an encoder without loading its weights."""

    folder: Path
    config: PretrainedConfig
    options: Encoder

    @property
    def width(self) -> int:
        """d_enc: values a frame."""
        return self.config.hidden_size

    @property
    def window_samples(self) -> int | None:
        """Samples at 16 kHz that are heard at once, or None where there is no window."""
        return None

    @abstractmethod
    def frames_of(self, samples: int) -> int:
        """How many frames an utterance of `samples` samples at 16 kHz becomes."""

    def span_of(self, samples: int) -> int:
        """The utterance's length in frames, by which LLM positions are counted.

        Equal to `frames_of`, or one more where the encoder's last frame would need samples beyond
        the end: the reference reserves that frame's position all the same.
        """
        return self.frames_of(samples)

    def seconds_of(self, samples: int) -> float:
        """Seconds that the encoder works on for an utterance: all of its windows, where there are windows."""
        return samples / SAMPLE_RATE

    def is_too_long(self, samples: int) -> bool:
        """Whether an utterance exceeds the window."""
        return self.window_samples is not None and samples > self.window_samples

    def count_parameters(self) -> int:
        """Number of weights, counted without loading them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.encoder_of(AutoModel.from_config(self.config)).parameters())

    def encoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The part of a checkpoint's model that encodes."""
        return model

    def fingerprint(self) -> dict[str, Any]:
        """What decides the output's values: weights, preprocessing, and how much is kept."""
        return {"weights_sha256": weights_sha256(self.folder), **self.preprocessing()}

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """What is done to the audio beside the weights."""

    @abstractmethod
    def preparer(self) -> Preparer:
        """What turns waveforms into the encoder's input; it can be sent to other processes."""

    @abstractmethod
    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "SpeechEncoder":
        """Load the weights, frozen.

        Raises:
            UserError: weights missing, damaged, or not finite.
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
        """[samples] at 16 kHz in float32 → what `forward` takes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Utterances of any lengths → [frames, width] each, as if each were encoded alone."""

    @torch.inference_mode()
    def encode(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """`forward`, without gradients."""
        return self(utterances)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


def batches_of(seconds: Sequence[float], budget: float) -> list[list[int]]:
    """Group utterances, in the order given, into batches for an encoder.

    Args:
        seconds: that the encoder works on for each.
        budget: seconds of a batch, each utterance counted as long as its longest; exceeded only by an
            utterance that is longer by itself.

    Returns:
        Indices of each batch.
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


def describe_encoder(options: Encoder) -> EncoderSpec:
    """Read an encoder's configuration, not its weights.

    Raises:
        UserError: the model is not there or is of a kind that is not supported.
    """
    folder = locate_model(options.name)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{options.name} ({folder}) has no readable config.json: {one_sentence(error)}"
        ) from error
    return spec_of(folder, config, options)


def spec_of(folder: Path, config: PretrainedConfig, options: Encoder) -> EncoderSpec:
    """What is known of an encoder from its configuration.

    Raises:
        UserError: it is of a kind that is not supported.
    """
    from slam_asr.models.waveform import WAVEFORM_MODELS, WaveformSpec
    from slam_asr.models.whisper import WhisperSpec

    if config.model_type == "whisper":
        return WhisperSpec(folder, config, options)
    if config.model_type in WAVEFORM_MODELS:
        return WaveformSpec(folder, config, options)
    raise UserError(
        f"encoder.name is {options.name}, a model of type {config.model_type}; "
        f"supported encoders: whisper, {', '.join(WAVEFORM_MODELS)}. Give one of these."
    )
