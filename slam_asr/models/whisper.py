"""Whisper's encoder: log-mel spectrograms of a 30-s window.

Whisper always hears its whole window, padded with silence: reported results depend on it. `frames`
says how much of the output is used. The number of mel bins (80, or 128 from large-v3 on) is the
checkpoint's.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from slam_asr.audio import SAMPLE_RATE
from slam_asr.models.encoder import SAMPLES_PER_FRAME, EncoderSpec, SpeechEncoder
from slam_asr.models.frontend import COLUMN_SAMPLES, LogMel, Prepared


class WhisperSpec(EncoderSpec):
    """A Whisper checkpoint's encoder half."""

    @property
    def width(self) -> int:
        """d_enc: values a frame."""
        return self.config.d_model

    @property
    def window_frames(self) -> int:
        """Frames of the whole window: 1500 for 30 s."""
        return self.config.max_source_positions

    @property
    def window_samples(self) -> int:
        """Samples at 16 kHz in the window: 480 000 for 30 s."""
        return self.window_frames * SAMPLES_PER_FRAME

    def windows_of(self, samples: int) -> int:
        """Windows that an utterance takes: one, unless long audio is split."""
        return self.preparer().windows_of(samples)

    def preparer(self) -> LogMel:
        """Of as many mel bins as the model has: not a file beside it, which might say another number."""
        return LogMel(self.config.num_mel_bins, self.window_samples, self.options.long_audio == "split")

    def seconds_of(self, samples: int) -> float:
        """Seconds of all windows: 30 for an utterance in one."""
        return self.windows_of(samples) * self.window_samples / SAMPLE_RATE

    def frames_of(self, samples: int) -> int:
        """All frames of all windows, or those that hold speech: ceil(samples / 320)."""
        heard = self.windows_of(samples) * self.window_frames
        return heard if self.options.frames == "all" else min(math.ceil(samples / SAMPLES_PER_FRAME), heard)

    def encoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The decoder half is dropped."""
        return model.get_encoder()

    def preprocessing(self) -> dict[str, Any]:
        """Window, mel bins, and how much is kept."""
        return {
            "window_frames": self.window_frames,
            "mel_bins": self.config.num_mel_bins,
            "frames": self.options.frames,
            "long_audio": "split" if self.options.long_audio == "split" else "cut",
        }

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "WhisperEncoder":
        """Load the weights, frozen."""
        return WhisperEncoder(self, dtype, device)


class WhisperEncoder(SpeechEncoder):
    """Encodes log-mel spectrograms."""

    spec: WhisperSpec

    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """All windows of all utterances at once; those of one utterance are joined again."""
        columns = self.spec.window_samples // COLUMN_SAMPLES
        whole = [
            functional.pad(w[None], (0, columns - w.shape[1]), mode="replicate")[0]
            for u in utterances
            for w in u.inputs
        ]
        windows = torch.stack(whole).to(self.device, self.dtype, non_blocking=True)
        hidden = self.model(windows).last_hidden_state
        parts = hidden.split([len(u.inputs) for u in utterances])
        return [
            p.flatten(0, 1)[: self.spec.frames_of(u.samples)] for p, u in zip(parts, utterances, strict=True)
        ]
