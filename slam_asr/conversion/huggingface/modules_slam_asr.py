"""The layers that SLAM-ASR adds to its encoder and its LLM. They need only torch and transformers."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .configuration_slam_asr import SlamAsrConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class SlamAsrProjector(nn.Module):
    """Turns the frames of each utterance [frames, encoder width] into LLM positions [positions, LLM width].

    Args:
        config: the projector's kind and sizes.
    """

    def __init__(self, config: SlamAsrConfig) -> None:
        super().__init__()
        options, width = config.projector, config.encoder_width
        self.kind, self.k = options["kind"], options["downsampling"]
        if self.kind == "q-former":
            qformer = Blip2QFormerConfig(encoder_hidden_size=width, num_hidden_layers=options["layers"])
            self.query = nn.Parameter(torch.zeros(1, options["queries"], qformer.hidden_size))
            self.qformer = Blip2QFormerModel(qformer)
            self.linear = nn.Linear(qformer.hidden_size, config.llm_width)
            self.norm = nn.LayerNorm(config.llm_width, eps=1e-5)
            return
        if self.kind == "cov1d-linear":
            self.conv1d = nn.Conv1d(width, width, self.k, stride=self.k)
        self.linear1 = nn.Linear(width if self.kind == "cov1d-linear" else self.k * width, options["hidden"])
        self.linear2 = nn.Linear(options["hidden"], config.llm_width)

    def forward(self, utterances: list[torch.Tensor], positions: list[int] | None = None) -> torch.Tensor:
        """Project utterances of unequal lengths.

        Args:
            utterances: features, each [frames, encoder width].
            positions: number of LLM positions of each utterance. Positions that its frames do not fill become
                zeros, and surplus outputs are dropped. If None, each utterance has as many positions as its
                frames fill.

        Returns:
            [sum of positions, LLM width], one utterance after another.
        """
        outputs = self._attend(utterances) if self.kind == "q-former" else self._project(utterances)
        if positions is not None:
            outputs = [
                functional.pad(o[:n], (0, 0, 0, max(0, n - len(o))))
                for o, n in zip(outputs, positions, strict=True)
            ]
        return torch.cat(outputs)

    def _project(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        counts = [len(u) // self.k for u in utterances]
        joined = torch.cat(
            [u[: n * self.k].reshape(n, self.k * u.shape[1]) for u, n in zip(utterances, counts, strict=True)]
        )  # [sum of positions, k · width]
        if self.kind == "cov1d-linear":
            # [positions, k · width] → [positions, width, k]: each position is a batch row of the convolution.
            joined = torch.relu(self.conv1d(joined.unflatten(1, (self.k, -1)).transpose(1, 2)).squeeze(2))
        return list(self.linear2(torch.relu(self.linear1(joined))).split(counts))

    def _attend(self, utterances: list[torch.Tensor]) -> list[torch.Tensor]:
        lengths = torch.tensor([len(u) for u in utterances], device=utterances[0].device)
        frames = pad_sequence(utterances, batch_first=True)
        attended = self.qformer(
            query_embeds=self.query.expand(len(utterances), -1, -1),
            encoder_hidden_states=frames,
            encoder_attention_mask=mask_of(lengths, frames.shape[1]),
        )
        return list(self.norm(self.linear(attended.last_hidden_state)))


class LoraLinear(nn.Module):
    """A linear layer with a low-rank adapter (LoRA). The adapter's output is added to the layer's."""

    def __init__(self, base: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        (rank, inputs), outputs = lora_a.shape, len(lora_b)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.lora_A.weight, self.lora_B.weight = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs for inputs of [..., width of the input]."""
        return self.base(hidden) + self.lora_B(self.lora_A(hidden)) * self.scale


class MaskedGroupNorm(nn.Module):
    """A group norm over time with one channel per group. Its statistics exclude padding.

    Otherwise, a batch's padding would change the frames of a WavLM, HuBERT or wav2vec 2.0 base model.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths: torch.Tensor | None = None
        """[utterances]: number of frames after the first convolution; None in a batch without padding."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [utterances, channels, frames]; the result has the same shape and dtype."""
        if self.lengths is None:
            return functional.group_norm(hidden, hidden.shape[1], self.weight, self.bias, self.eps)
        x, count = hidden.float(), self.lengths[:, None, None]
        valid = torch.arange(x.shape[2], device=x.device) < count
        # Padding is zeroed after the mean is subtracted, so that it adds nothing to the variance.
        centred = (x - (x * valid).sum(2, keepdim=True) / count) * valid
        scaled = centred * torch.rsqrt((centred**2).sum(2, keepdim=True) / count + self.eps)
        return (scaled * self.weight.float()[:, None] + self.bias.float()[:, None]).to(hidden.dtype)


def mask_of(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Return a mask [rows, width] int64 that is 1 in the first `lengths` columns of each row."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def round_features(frames: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round frames [frames, width] to the dtype that the projector was trained on."""
    if dtype != "fp8":
        return frames.to(_DTYPES[dtype])
    # A scale for each frame turns its largest absolute value into 448, the largest of e4m3.
    frames = frames.float()
    scales = frames.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return ((frames / scales).to(torch.float8_e4m3fn).float() * scales).to(torch.bfloat16)
