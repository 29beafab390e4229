"""WavLM, HuBERT and wav2vec 2.0: encoders whose input is the waveform itself."""

import json
import warnings
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from slam_asr.errors import ModelError
from slam_asr.models.encoders.base import SAMPLES_PER_FRAME, EncoderSpec, SpeechEncoder
from slam_asr.models.encoders.frontend import Prepared, Waveform
from slam_asr.models.encoders.waveform_batch import encode_waveforms, frames_of, mask_first_norm

WAVEFORM_MODELS = ("wavlm", "hubert", "wav2vec2")
"""Supported values of `model_type` in transformers' configurations."""


class WaveformSpec(EncoderSpec):
    """Describes a WavLM, HuBERT or wav2vec 2.0 checkpoint. If it has a CTC head, the head is dropped."""

    def frames_of(self, samples: int) -> int:
        """Return the output length of the unpadded convolutions: 1 for 400 samples, then 1 more per 320."""
        return frames_of(self.config, samples)

    def span_of(self, samples: int) -> int:
        """Return samples // 320. This may count a last frame whose samples would reach beyond the end."""
        return samples // SAMPLES_PER_FRAME

    @property
    def normalize(self) -> bool:
        """Whether the checkpoint was trained on waveforms that are layer-normalised over their samples.

        Raises:
            ModelError: preprocessor_config.json does not state it.
        """
        path = self.folder / "preprocessor_config.json"
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["do_normalize"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path} does not state whether the encoder needs normalised waveforms (do_normalize): "
                "fetch the model again."
            ) from error

    def encoder_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the complete model, with the augmentations of its own pretraining disabled."""
        # In training mode, transformers would mask frames and drop layers at random.
        model.config.apply_spec_augment, model.config.layerdrop = False, 0.0
        return model

    def preprocessing(self) -> dict[str, Any]:
        """Return whether waveforms are normalised."""
        return {"normalize": self.normalize}

    def preparer(self) -> Waveform:
        """Return the function that prepares waveforms, with normalisation if the checkpoint needs it."""
        return Waveform(self.normalize)

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "WaveformEncoder":
        """Load the encoder with frozen weights."""
        # transformers' WavLM passes two masks of different dtypes to torch, which warns. Users cannot change
        # this.
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        return WaveformEncoder(self, dtype, device)


class WaveformEncoder(SpeechEncoder):
    """Encodes waveforms."""

    spec: WaveformSpec

    def __init__(self, spec: WaveformSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, dtype, device)
        mask_first_norm(self.model)

    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Encode all utterances in one batch: pad their waveforms with zeros, and mask the padding.

        Returns:
            A tensor [frames, width] per utterance. It has 0 frames if the utterance has fewer than 400
            samples.
        """
        waveforms = pad_sequence([u.inputs[0] for u in utterances], batch_first=True)
        waveforms = waveforms.to(self.model.device, self.model.dtype)
        return encode_waveforms(self.model, waveforms, [u.samples for u in utterances])
