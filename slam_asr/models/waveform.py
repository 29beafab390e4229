"""WavLM, HuBERT and wav2vec 2.0: encoders that take the waveform itself.

In a batch of unequal lengths each utterance gets, frame for frame, what it gets alone. Padding is
masked, and in the base models, whose first convolution is normalised over time, it is kept out of
that norm's statistics as well: with it, their outputs would be off by as much as they are large.
"""

import json
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from slam_asr.errors import UserError
from slam_asr.models.encoder import SAMPLES_PER_FRAME, EncoderSpec, SpeechEncoder
from slam_asr.models.frontend import Prepared, Waveform

# transformers' WavLM gives torch its two masks in two types; users can do nothing about it.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")

WAVEFORM_MODELS = ("wavlm", "hubert", "wav2vec2")
"""Their `model_type` in transformers' configurations."""


class WaveformSpec(EncoderSpec):
    """A WavLM, HuBERT or wav2vec 2.0 checkpoint; a CTC head on it is dropped."""

    def frames_of(self, samples: int) -> int:
        """Frames that the convolutions give without padding: one for 400 samples and for each 320 more."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def span_of(self, samples: int) -> int:
        """samples // 320: one more than `frames_of` where the last frame would reach beyond the end."""
        return samples // SAMPLES_PER_FRAME

    @property
    def normalize(self) -> bool:
        """Whether the checkpoint wants each waveform layer-normalised over its own samples.

        Raises:
            UserError: the checkpoint does not say.
        """
        path = self.folder / "preprocessor_config.json"
        try:
            return bool(json.loads(path.read_text())["do_normalize"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not say whether the encoder wants normalised waveforms (do_normalize): fetch the model again."
            ) from error

    def encoder_of(self, model: PreTrainedModel) -> nn.Module:
        """The whole model, without what only its own training needs."""
        # In training mode these drop frames and layers at random; here the projector's loss is trained.
        model.config.apply_spec_augment, model.config.layerdrop = False, 0.0
        return model

    def preprocessing(self) -> dict[str, Any]:
        """Whether waveforms are normalised."""
        return {"normalize": self.normalize}

    def preparer(self) -> Waveform:
        """Normalising or not, as the checkpoint says."""
        return Waveform(self.normalize)

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "WaveformEncoder":
        """Load the weights, frozen."""
        return WaveformEncoder(self, dtype, device)


class WaveformEncoder(SpeechEncoder):
    """Encodes waveforms."""

    spec: WaveformSpec

    def __init__(self, spec: WaveformSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, dtype, device)
        first = self.model.feature_extractor.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm(first.layer_norm)

    def forward(self, utterances: list[Prepared]) -> list[torch.Tensor]:
        """Waveforms are padded with zeros to the longest and masked."""
        frames = [self.spec.frames_of(u.samples) for u in utterances]
        heard = [u for u, n in zip(utterances, frames, strict=True) if n > 0]
        if not heard:
            return [torch.zeros(0, self.spec.width, dtype=self.dtype, device=self.device) for u in utterances]
        lengths = torch.tensor([u.samples for u in heard], device=self.device)
        waveforms = pad_sequence([u.inputs[0] for u in heard], batch_first=True).to(self.device, self.dtype)
        mask = None
        if len(set(lengths.tolist())) > 1:
            mask = (torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None]).long()
        self._tell_group_norm(None if mask is None else lengths)
        outputs = iter(self.model(waveforms, attention_mask=mask).last_hidden_state)
        return [next(outputs)[:n] if n else waveforms.new_zeros(0, self.spec.width) for n in frames]

    def _tell_group_norm(self, lengths: torch.Tensor | None) -> None:
        first = self.model.feature_extractor.conv_layers[0]
        norm = getattr(first, "layer_norm", None)
        if isinstance(norm, MaskedGroupNorm):
            kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
            norm.lengths = None if lengths is None else (lengths - kernel) // stride + 1


class MaskedGroupNorm(nn.Module):
    """A group norm of one channel a group whose statistics leave padding out."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths: torch.Tensor | None = None
        """Frames of each utterance without padding; None where there is none."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[utterances, channels, frames] → the same shape."""
        if self.lengths is None:
            return functional.group_norm(hidden, hidden.shape[1], self.weight, self.bias, self.eps)
        x, count = hidden.float(), self.lengths[:, None, None]
        valid = torch.arange(x.shape[2], device=x.device) < count
        centred = (x - (x * valid).sum(2, keepdim=True) / count) * valid
        scaled = centred * torch.rsqrt((centred**2).sum(2, keepdim=True) / count + self.eps)
        return (scaled * self.weight.float()[:, None] + self.bias.float()[:, None]).to(hidden.dtype)
