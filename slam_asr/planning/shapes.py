"""Computes sizes of encoder and LLM from their configurations, on torch's meta device, without weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoConfig, PretrainedConfig

from slam_asr.config.recipe import Recipe
from slam_asr.errors import UserError
from slam_asr.models.answer_loss import gives_bare_logits
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import spec_of
from slam_asr.models.llm import build_llm, checkpoint_layers, llm_width, set_tuning
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import build_projector
from slam_asr.pretrained.locate import locate_config
from slam_asr.pretrained.model_config import read_model_config
from slam_asr.pretrained.weight_checks import require_sound_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Attention(torch.autograd.Function):
    """Attention that saves the same tensors as fused kernels but computes nothing."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        # The last tensor stands for the logarithm of the sum of exponentials, of which fused kernels save one
        # number in fp32 per head and position.
        logarithms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, logarithms)
        return output

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


@dataclass
class Shapes:
    """The models of a recipe, without weights."""

    recipe: Recipe
    encoder: EncoderSpec
    llm_config: PretrainedConfig
    notes: list[str]
    """A sentence for each configuration that does not come from the model itself."""
    _cache: dict[Any, Any] = field(default_factory=dict)
    """Results so far. Copies made by `dataclasses.replace`, with other options, share this dictionary."""

    @property
    def llm(self) -> "PreTrainedModel":
        """The LLM on the meta device, in the precision of training. Its trained weights require gradients."""
        return self._llm(checkpointed=False)

    def _llm(self, checkpointed: bool) -> "PreTrainedModel":
        key = ("llm", self.recipe.training.precision, checkpointed)
        if key not in self._cache:
            AttentionInterface.register("counted", _attention)
            options = self.recipe.llm
            llm = build_llm(
                self.llm_config, options.name, options.trust_remote_code, attn_implementation="counted"
            )
            # transformers wraps `to` in a way that hides its signature.
            cast("torch.nn.Module", llm).to(DTYPES[self.recipe.training.precision])
            set_tuning(llm, self.recipe.llm, seed=0)
            if checkpointed:
                checkpoint_layers(llm)
            self._cache[key] = llm
        return self._cache[key]

    @property
    def encoder_parameters(self) -> int:
        """Number of parameters of the encoder, without a decoder."""
        return self.encoder.count_parameters()

    @property
    def projector_parameters(self) -> int:
        """Number of parameters of the projector, all of which are trained."""
        with torch.device("meta"):
            projector = build_projector(self.recipe.projector, self.encoder.width, llm_width(self.llm))
        return sum(p.numel() for p in projector.parameters())

    @property
    def llm_parameters(self) -> int:
        """Number of parameters of the LLM, including adapters."""
        return sum(p.numel() for p in self.llm.parameters())

    @property
    def llm_trained(self) -> int:
        """Number of trained parameters of the LLM."""
        return sum(p.numel() for p in self.llm.parameters() if p.requires_grad)

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters of projector, LLM and encoder together."""
        tuned = self.encoder_parameters if self.recipe.encoder.tuning == "full" else 0
        return self.projector_parameters + self.llm_trained + tuned

    @property
    def host_optimizer_bytes(self) -> int:
        """Bytes of an offloaded optimiser on all hosts: fp32 masters and Adam's two moments."""
        return 12 * self.trained_parameters

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of the LLM's layers.

        The embedding is not counted, because it takes no FLOPs. The output layer is not counted, because it
        runs only on answers.
        """
        # If the embedding is tied to the output layer, both are the same parameter, which counts only once.
        inputs, outputs = self.llm.get_input_embeddings(), self.llm.get_output_embeddings()
        tables = {*inputs.parameters(), *outputs.parameters()}
        return self.llm_parameters - sum(p.numel() for p in tables)

    @property
    def vocabulary(self) -> int:
        """Number of rows of the output layer."""
        return self.llm.get_output_embeddings().weight.shape[0]

    @property
    def scores_in_chunks(self) -> bool:
        """Whether training computes logits one chunk at a time.

        Training has the same conditions, but checks them on the LLM with its weights, by
        `answer_loss.allows_chunks` (not called under ZeRO stage 3).
        """
        head, options = self.llm.get_output_embeddings(), self.recipe.training
        if options.zero_stage == 3 or options.precision == "fp16":
            return False
        if type(head) is not torch.nn.Linear or head.weight.requires_grad:
            return False
        if "bare logits" not in self._cache:
            self._cache["bare logits"] = gives_bare_logits(self.llm)
        return self._cache["bare logits"]

    @property
    def width(self) -> int:
        """Width of the LLM's hidden states."""
        return llm_width(self.llm)

    @property
    def layers(self) -> int:
        """Number of the LLM's layers."""
        return self.llm_config.get_text_config().num_hidden_layers

    def saved_bytes(self, rows: float, length: int) -> float:
        """Bytes of the tensors, other than weights, that the LLM saves for the backward pass.

        Args:
            rows: number of utterances.
            length: number of LLM positions of each utterance.
        """
        return rows * self._saved_bytes_of_a_row(length, self.recipe.training.gradient_checkpointing)

    def saved_bytes_of_a_layer(self, rows: float, length: int) -> float:
        """Bytes that one layer saves if it is not checkpointed, or while it is recomputed."""
        return rows * self._saved_bytes_of_a_row(length, False) / self.layers

    def _saved_bytes_of_a_row(self, length: int, checkpointed: bool) -> int:
        key = ("bytes", self.recipe.training.precision, length, checkpointed)
        if key not in self._cache:
            self._cache[key] = _saved_bytes(self._llm(checkpointed), length)
        return self._cache[key]


def _saved_bytes(llm: "PreTrainedModel", length: int) -> int:
    # Meta tensors have no data pointer, so a storage is identified by the address of its C++ object. `saved`
    # holds one tensor per storage, so that views count once, and no address is reused for another storage.
    weights = {p.untyped_storage()._cdata for p in llm.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    dtype = next(llm.parameters()).dtype
    embeddings = torch.empty(1, length, llm_width(llm), dtype=dtype, device="meta", requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        # Multiplied by 1, so that the input is not a leaf tensor: in training it comes from the projector.
        # `base_model` is the LLM without its output layer, whose logits `memory` counts separately.
        llm.base_model(inputs_embeds=embeddings * 1, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def describe(recipe: Recipe) -> Shapes:
    """Read the configurations of a recipe's models, without their weights.

    Raises:
        UserError: a configuration is not on this machine, on the hub or in known_models.yaml.
    """
    notes: list[str] = []
    encoder = _config(recipe.encoder.name, "encoder", False, notes)
    llm = _config(recipe.llm.name, "LLM", recipe.llm.trust_remote_code, notes)
    return Shapes(recipe, spec_of(Path(recipe.encoder.name), encoder, recipe.encoder), llm, notes)


def _config(name: str, part: str, trust_remote_code: bool, notes: list[str]) -> PretrainedConfig:
    known = yaml.safe_load(Path(__file__).with_name("known_models.yaml").read_text(encoding="utf-8"))
    try:
        folder = locate_config(name)
    except UserError:
        if name not in known:
            raise
    else:
        # A model from the hub may have no weights on this machine. Weights in a local folder are checked now,
        # so that damage is found early.
        require_sound_files(folder, part, may_be_absent=True)
        return read_model_config(folder, part, trust_remote_code)
    notes.append(f"{name}: sizes as published; the model is not on this machine")
    values = dict(known[name])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def encoder_flops(spec: EncoderSpec, samples: int) -> float:
    """Estimate the FLOPs of encoding one utterance; a multiply-add counts as 2.

    The FLOPs of linear layers and convolutions follow from their weights, and those of attention from its two
    products over all pairs of frames.

    Args:
        spec: the encoder.
        samples: length of the utterance in samples at 16 kHz. Whisper always encodes a window of 30 s.
    """
    config = spec.config
    if spec.window_samples:
        frames = spec.window_samples // 320
        width, layers = config.d_model, config.encoder_layers
        # Two convolutions with kernels of 3. The first has two outputs per frame, and the second has one.
        total = 2 * 2 * frames * 3 * config.num_mel_bins * width + 2 * frames * 3 * width * width
        feed_forward = config.encoder_ffn_dim
    else:
        width, layers, feed_forward = config.hidden_size, config.num_hidden_layers, config.intermediate_size
        total, frames, channels = 0.0, samples, 1
        for dim, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
            frames = max(0, (frames - kernel) // stride + 1)
            total += 2 * frames * kernel * channels * dim
            channels = dim
        # The projection to the encoder's width, and then the convolution for position embeddings.
        total += 2 * frames * channels * width
        kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        total += 2 * frames * kernel * width * width / groups
    # Four projections of attention, two layers of the feed-forward network, and the products of attention.
    per_layer = 2 * frames * (4 * width * width + 2 * width * feed_forward) + 4 * frames * frames * width
    return total + layers * per_layer
