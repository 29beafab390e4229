"""Frozen speech encoders: waveforms in, one [frames, width] tensor an utterance out.

Whisper always hears its whole 30-s window, padded with silence: reported results depend on it.
`frames` says how much of the output is used. Every encoder here gives 50 frames a second, that is
one frame for 320 samples at 16 kHz.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slam_asr.audio import SAMPLE_RATE
from slam_asr.errors import UserError
from slam_asr.models.pretrained import UNREADABLE_WEIGHTS, locate_model, weights_sha256
from slam_asr.recipe import Encoder, one_sentence

SAMPLES_PER_FRAME = 320
"""At 16 kHz: Whisper's hop of 160 samples times its convolution's stride of 2."""


@dataclass
class EncoderSpec:
    """What is known of an encoder without loading its weights."""

    folder: Path
    width: int
    """d_enc: values a frame."""
    window_frames: int
    """Frames of the whole window."""
    mel_bins: int
    frames: str
    """`all` or `speech`, as in the recipe."""

    @property
    def window_samples(self) -> int:
        """Samples at 16 kHz in the window: 480 000 for Whisper's 30 s."""
        return self.window_frames * SAMPLES_PER_FRAME

    def frames_of(self, samples: int) -> int:
        """How many frames of the output an utterance of `samples` samples at 16 kHz keeps."""
        if self.frames == "all":
            return self.window_frames
        return min(math.ceil(samples / SAMPLES_PER_FRAME), self.window_frames)

    def frames_of_seconds(self, duration: float) -> int:
        """The same, from a manifest's duration."""
        return self.frames_of(round(duration * SAMPLE_RATE))

    @property
    def parameters(self) -> int:
        """Number of weights, counted without loading them."""
        from transformers import AutoConfig, WhisperModel

        with torch.device("meta"):
            encoder = WhisperModel(AutoConfig.from_pretrained(self.folder)).get_encoder()
        return sum(p.numel() for p in encoder.parameters())

    def fingerprint(self) -> dict:
        """What decides the output's values: weights, preprocessing, and how much is kept."""
        return {
            "weights_sha256": weights_sha256(self.folder),
            "window_frames": self.window_frames, "mel_bins": self.mel_bins, "frames": self.frames,
        }


def describe_encoder(options: Encoder) -> EncoderSpec:
    """Read an encoder's configuration, not its weights.

    Raises:
        UserError: the model is not there or is of a kind that is not supported.
    """
    from transformers import AutoConfig

    folder = locate_model(options.name)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.name} ({folder}) has no readable config.json: {one_sentence(error)}") from error
    if config.model_type != "whisper":
        raise UserError(
            f"encoder.name is {options.name}, a model of type {config.model_type}; "
            "supported encoders: whisper. Give a Whisper checkpoint."
        )
    return EncoderSpec(folder, config.d_model, config.max_source_positions, config.num_mel_bins, options.frames)


class WhisperEncoder:
    """The encoder half of a Whisper checkpoint, frozen.

    Args:
        spec: from `describe_encoder`.
        dtype: of weights and activations.
        device: where it runs.
    """

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        import transformers
        from transformers import WhisperFeatureExtractor, WhisperModel

        # Its bars for the loading of weights would tear the stage's own log.
        transformers.utils.logging.disable_progress_bar()

        self.spec, self.dtype, self.device = spec, dtype, device
        try:
            self.mel = WhisperFeatureExtractor.from_pretrained(spec.folder)
            model = WhisperModel.from_pretrained(spec.folder, dtype=dtype, attn_implementation="sdpa")
        except UNREADABLE_WEIGHTS as error:
            raise UserError(f"The encoder in {spec.folder} cannot be loaded: {one_sentence(error)}") from error
        self.model = model.get_encoder().eval().requires_grad_(False).to(device)

    def log_mel(self, waveform: np.ndarray) -> torch.Tensor:
        """[samples] at 16 kHz → log-mel spectrogram [mel bins, 2 · window frames] in float32."""
        features = self.mel(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return features.input_features[0]

    @torch.inference_mode()
    def encode(self, mels: list[torch.Tensor], samples: list[int]) -> list[torch.Tensor]:
        """Log-mel spectrograms and their utterances' lengths in samples → [frames, width] each."""
        batch = torch.stack(mels).to(self.device, self.dtype)
        hidden = self.model(batch).last_hidden_state
        return [h[: self.spec.frames_of(n)] for h, n in zip(hidden, samples, strict=True)]


def load_encoder(spec: EncoderSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> WhisperEncoder:
    """Load the encoder that `spec` describes."""
    return WhisperEncoder(spec, dtype, device)
