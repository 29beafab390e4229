"""WavLM, HuBERT and wav2vec 2.0: encoders whose input is the waveform itself.

In a batch of unequal lengths, each utterance gets the same frames as when it is encoded alone, except for
rounding. To achieve this, padding is masked in the attention. The base models also normalise their first
convolution's output over time. If padding entered these statistics, the error would be as large as the output
itself.
"""

import json
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from slam_asr.errors import ModelError
from slam_asr.models.encoders.base import SAMPLES_PER_FRAME, EncoderSpec, SpeechEncoder
from slam_asr.models.encoders.frontend import Prepared, Waveform

WAVEFORM_MODELS = ("wavlm", "hubert", "wav2vec2")
"""Supported values of `model_type` in transformers' configurations."""


class WaveformSpec(EncoderSpec):
    """Describes a WavLM, HuBERT or wav2vec 2.0 checkpoint. If it has a CTC head, the head is dropped."""

    def frames_of(self, samples: int) -> int:
        """Return the output length of the unpadded convolutions: 1 for 400 samples, then 1 more per 320."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

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
        model: Any = self.model  # the class of its feature extractor differs between the models
        first = model.feature_extractor.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm(first.layer_norm, first.conv)

    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Encode all utterances in one batch: pad their waveforms with zeros, and mask the padding.

        Returns:
            A tensor [frames, width] per utterance. It has 0 frames if the utterance has fewer than 400
            samples.
        """
        frames = [self.spec.frames_of(u.samples) for u in utterances]
        encodable = [u for u, n in zip(utterances, frames, strict=True) if n > 0]
        if not encodable:
            return [
                torch.zeros(0, self.spec.width, dtype=self.model.dtype, device=self.model.device)
                for u in utterances
            ]
        lengths = torch.tensor([u.samples for u in encodable], device=self.model.device)
        waveforms = pad_sequence([u.inputs[0] for u in encodable], batch_first=True).to(
            self.model.device, self.model.dtype
        )
        # Without padding no mask is needed, and attention may use its faster kernels.
        mask = None
        if len(set(lengths.tolist())) > 1:
            mask = (torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None]).long()
        for norm in self.model.modules():
            if isinstance(norm, MaskedGroupNorm):
                norm.samples = None if mask is None else lengths
        # Utterances that are too short for a frame were not in the batch. The others take the outputs in
        # order.
        outputs = iter(self.model(waveforms, attention_mask=mask).last_hidden_state)
        return [next(outputs)[:n] if n else waveforms.new_zeros(0, self.spec.width) for n in frames]


class MaskedGroupNorm(nn.Module):
    """A group norm with one channel per group. Its statistics exclude padding.

    Args:
        norm: the norm that this one replaces; its weights are shared.
        convolution: the unpadded convolution of the waveform whose outputs are normalised.
    """

    def __init__(self, norm: nn.GroupNorm, convolution: nn.Conv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.kernel, self.stride = convolution.kernel_size[0], convolution.stride[0]
        self.samples: torch.Tensor | None = None
        """[utterances] int64: each utterance's length in samples, enough for at least one frame. None if the
        batch has no padding."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [utterances, channels, frames] over the frames; the shape is unchanged."""
        if self.samples is None:
            return functional.group_norm(hidden, hidden.shape[1], self.weight, self.bias, self.eps)
        # The norm is computed in fp32, because sums over thousands of frames would be inexact in half
        # precision. Padding is set to 0 after the mean is subtracted, so that it adds nothing to the
        # variance. https://github.com/facebookresearch/fairseq/issues/3227 shows what padding does otherwise.
        x, count = hidden.float(), ((self.samples - self.kernel) // self.stride + 1)[:, None, None]
        valid = torch.arange(x.shape[2], device=x.device) < count
        centred = (x - (x * valid).sum(2, keepdim=True) / count) * valid
        scaled = centred * torch.rsqrt((centred**2).sum(2, keepdim=True) / count + self.eps)
        return (scaled * self.weight.float()[:, None] + self.bias.float()[:, None]).to(hidden.dtype)
