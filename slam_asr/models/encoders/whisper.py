"""Whisper's encoder, whose input is the log-mel spectrogram of a 30-second window.

Audio is always padded with silence to the full window, because published results depend on this. The option
`encoder.frames` determines how many of the output frames are used. The number of mel bins (80, or 128 from
large-v3 on) comes from the checkpoint.
"""

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from slam_asr.audio import SAMPLE_RATE
from slam_asr.models.encoders.base import SAMPLES_PER_FRAME, EncoderSpec, SpeechEncoder
from slam_asr.models.encoders.frontend import COLUMN_SAMPLES, LogMel, Prepared


class WhisperSpec(EncoderSpec):
    """Describes the encoder of a Whisper checkpoint."""

    @property
    def width(self) -> int:
        """Number of values per frame (d_enc)."""
        return self.config.d_model

    @property
    def window_frames(self) -> int:
        """Number of frames of a full window: 1500 for 30 s."""
        return self.config.max_source_positions

    @property
    def window_samples(self) -> int:
        """Number of samples of a full window at 16 kHz: 480 000 for 30 s."""
        return self.window_frames * SAMPLES_PER_FRAME

    def windows_of(self, samples: int) -> int:
        """Return the number of windows of an utterance: one, unless long audio is split."""
        return self.preparer().windows_of(samples)

    def preparer(self) -> LogMel:
        """Return the function that computes spectrograms, with as many mel bins as the weights need."""
        return LogMel(self.config.num_mel_bins, self.window_samples, self.options.long_audio == "split")

    def seconds_of(self, samples: int) -> float:
        """Return the total length of the utterance's windows in seconds: 30 for one window."""
        return self.windows_of(samples) * self.window_samples / SAMPLE_RATE

    def frames_of(self, samples: int) -> int:
        """Return the number of frames that are used: all, or ceil(samples / 320) with `frames: speech`."""
        total = self.windows_of(samples) * self.window_frames
        return total if self.options.frames == "all" else min(math.ceil(samples / SAMPLES_PER_FRAME), total)

    def encoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the encoder. The decoder is dropped."""
        return model.get_encoder()

    def preprocessing(self) -> dict[str, Any]:
        """Return the window, the mel bins, which frames are used, and what happens to long audio."""
        return {
            "window_frames": self.window_frames,
            "mel_bins": self.config.num_mel_bins,
            "frames": self.options.frames,
            # `set-aside` only excludes utterances: the frames of all others are the same as with `cut`.
            "long_audio": "split" if self.options.long_audio == "split" else "cut",
        }

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "WhisperEncoder":
        """Load the encoder with frozen weights."""
        return WhisperEncoder(self, dtype, device)


class WhisperEncoder(SpeechEncoder):
    """Encodes log-mel spectrograms."""

    spec: WhisperSpec

    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Encode all windows of all utterances, and join the windows of each utterance.

        Returns:
            A tensor [frames, width] per utterance.
        """
        columns = self.spec.window_samples // COLUMN_SAMPLES
        # A spectrogram that is shorter than the window ends with a column of silence. Repeating that column
        # fills the window.
        inputs = [window[None] for utterance in utterances for window in utterance.inputs]
        padded = [functional.pad(i, (0, columns - i.shape[2]), mode="replicate") for i in inputs]
        # [windows, bins, columns]
        windows = torch.cat(padded).to(self.model.device, self.model.dtype, non_blocking=True)
        # On a CPU, the activations of several windows do not fit into the caches. With eight at a time, a
        # window took 1.3 times as long as alone, with the same output.
        at_once = 1 if self.model.device.type == "cpu" else len(windows)
        hidden = torch.cat([self.model(part).last_hidden_state for part in windows.split(at_once)])
        parts = hidden.split([len(u.inputs) for u in utterances])  # each [windows, frames, width]
        return [
            p.flatten(0, 1)[: self.spec.frames_of(u.samples)] for p, u in zip(parts, utterances, strict=True)
        ]
