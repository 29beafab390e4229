"""A speech encoder, a projector and an LLM, joined to transcribe speech.

This file needs only torch and transformers. The folder that contains it holds the trained weights in
`model.safetensors`: the projector, and a LoRA adapter if the LLM has one. Encoder and LLM are loaded from the
places that `config.json` names, or, if it names none, from the subfolders `encoder` and `llm`.
"""

import copy
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .configuration_slam_asr import SlamAsrConfig
from .ctc_slam_asr import CtcPrefixProcessor, ctc_logits, require_ctc_weight, without_blanks
from .feature_dtype_slam_asr import round_trip
from .projector_slam_asr import build_projector
from .waveform_batch_slam_asr import encode_waveforms, mask_first_norm

SAMPLES_PER_FRAME = 320
"""Samples per encoder frame at 16 kHz."""
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
_REPLACEABLE = ("encoder_name", "llm_name", "encoder_dtype")
"""Entries of config.json that `from_pretrained` also takes as arguments."""


class SlamAsrForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Transcribes speech; `from_pretrained` builds it.

    Args:
        config: the names, sizes and options of the three parts.
        encoder: Whisper, WavLM, HuBERT or wav2vec 2.0, as `AutoModel` loads it.
        llm: any causal LM.
    """

    config_class = SlamAsrConfig
    main_input_name = "input_ids"
    input_modalities = ["audio", "text"]  # noqa: RUF012  # transformers' own models do it this way
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    config: SlamAsrConfig
    # Classes of encoders and LLMs differ, and declare few of their parts.
    encoder: Any
    llm: Any

    def __init__(self, config: Any, encoder: Any, llm: Any) -> None:
        super().__init__(config)
        self.is_whisper = encoder.config.model_type == "whisper"
        self.encoder = encoder.get_encoder() if self.is_whisper else encoder
        sizes = SimpleNamespace(**config.projector)
        self.projector = build_projector(sizes, config.encoder_width, config.llm_width)
        self.llm = llm
        if not self.is_whisper:
            # In training mode, transformers would mask frames and drop layers at random.
            self.encoder.config.apply_spec_augment, self.encoder.config.layerdrop = False, 0.0
            mask_first_norm(self.encoder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the three parts.

        Args:
            pretrained_model_name_or_path: the folder, or its name on the hub.
            args: not used.
            kwargs: arguments of transformers' `from_pretrained`: `config`, `dtype`, `device_map`,
                `attn_implementation`, `quantization_config` (for the LLM) and the hub's options. In addition,
                `encoder_name`, `llm_name` and `encoder_dtype` replace the entries of config.json. All other
                arguments are ignored.
        """
        place = str(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        here = {**hub, "revision": kwargs.get("revision")}
        config = kwargs.get("config")
        # An object of SlamAsrConfig may fail a check for this class, because transformers may have imported
        # this folder's files more than once.
        if not isinstance(config, PreTrainedConfig):
            config = SlamAsrConfig.from_pretrained(place, **here, trust_remote_code=False)
        for name in _REPLACEABLE:
            setattr(config, name, kwargs.get(name, getattr(config, name)))
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        options = {n: kwargs[n] for n in ("device_map", "attn_implementation") if kwargs.get(n) is not None}

        def load(kind: Any, name: str | None, part: str, **more: Any) -> PreTrainedModel:
            where = {**here, "subfolder": part} if name is None else hub
            try:
                return kind.from_pretrained(
                    name or place, **where, **options, **more, trust_remote_code=False
                )
            except OSError as error:
                what = f"{part} {name}" if name else part
                raise OSError(
                    f"The {what} of {place} cannot be loaded: if it is elsewhere, give {part}_name=…"
                ) from error

        encoder = load(AutoModel, config.encoder_name, "encoder", dtype=_as_dtype(config.encoder_dtype))
        quantized = {n: kwargs[n] for n in ("quantization_config",) if kwargs.get(n) is not None}
        llm = load(AutoModelForCausalLM, config.llm_name, "llm", dtype=_as_dtype(dtype), **quantized)
        model = cls(config, encoder, llm)
        model._take_trained_weights(load_file(str(cached_file(place, SAFE_WEIGHTS_NAME, **here))))
        model.generation_config = GenerationConfig.from_pretrained(place, **here, trust_remote_code=False)
        return model.eval()

    def _take_trained_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load the projector's weights, and add the LoRA adapter's layers to the LLM."""
        embedding = self.llm.get_input_embeddings().weight
        projector = {
            n.removeprefix("projector."): t for n, t in weights.items() if n.startswith("projector.")
        }
        self.projector.load_state_dict(projector)
        self.projector.to(embedding.device, embedding.dtype)
        for name in [n for n in weights if n.endswith(".lora_A.weight")]:
            path = name.removeprefix("llm.").removesuffix(".lora_A.weight")
            base = self.llm.get_submodule(path)
            device = next(base.parameters()).device
            a, b = (
                weights[f"llm.{path}.{part}.weight"].to(device, embedding.dtype)
                for part in ("lora_A", "lora_B")
            )
            parent, _, last = path.rpartition(".")
            setattr(
                self.llm.get_submodule(parent), last, LoraLinear(base, a, b, self.config.lora_scale or 1.0)
            )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the configuration and the trained weights, those of the projector and the adapter.

        Raises:
            ValueError: the encoder or the LLM is in this model's own folder, so the saved folder would lack
                it.
        """
        if self.config.encoder_name is None or self.config.llm_name is None:
            raise ValueError(
                "This model's folder contains its encoder or LLM, which save_pretrained does not copy: copy "
                "the folder itself, or load the model with encoder_name=… and llm_name=…."
            )
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        weights = kwargs.get("state_dict") or self.state_dict()
        names = [n for n in weights if n.startswith("projector.") or ".lora_" in n]
        trained = {n: weights[n].float().contiguous().cpu() for n in names}
        save_file(trained, Path(save_directory) / SAFE_WEIGHTS_NAME, {"format": "pt"})
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """Return the LLM's token embeddings."""
        return self.llm.get_input_embeddings()

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        audio_lengths: torch.Tensor,
        positions: list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project audio.

        Args:
            input_features: for Whisper, log-mel spectrograms [windows, bins, columns]; for other encoders,
                waveforms [utterances, samples] at 16 kHz, padded on the right.
            audio_lengths: [utterances], in samples at 16 kHz.
            positions: number of LLM positions of each utterance; by default, as many as its frames fill.
            kwargs: not used.

        Returns:
            `pooler_output` is [sum of positions, LLM width], one utterance after another.
        """
        frames = self._encode(input_features, audio_lengths.tolist())
        weight = next(self.projector.parameters())
        rounded = [round_trip(f, self.config.feature_dtype).to(weight.device, weight.dtype) for f in frames]
        return BaseModelOutputWithPooling(pooler_output=self.projector(rounded, positions))

    def _encode(self, inputs: torch.Tensor, samples: list[int]) -> list[torch.Tensor]:
        """Return each utterance's frames [frames, encoder width]."""
        weight = next(self.encoder.parameters())
        inputs = inputs.to(weight.device, weight.dtype)
        if self.is_whisper:
            window = self.encoder.config.max_source_positions
            split = self.config.long_audio == "split"
            counts = [max(1, math.ceil(n / (window * SAMPLES_PER_FRAME))) if split else 1 for n in samples]
            # [windows, frames, width], divided into the windows of each utterance.
            parts = self.encoder(inputs).last_hidden_state.split(counts)
            speech = self.config.frames == "speech"
            return [
                part.flatten(0, 1)[: math.ceil(n / SAMPLES_PER_FRAME) if speech else None]
                for part, n in zip(parts, samples, strict=True)
            ]
        return encode_waveforms(self.encoder, inputs, samples)

    def _embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        input_features: torch.Tensor | None,
        audio_lengths: torch.Tensor | None,
        ctc: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return what the LLM reads.

        Returns:
            Embeddings [rows, positions, LLM width] of tokens and projected audio; the attention mask, which
            is 0 at blanks too if the model was trained without them; and CTC's logits of all audio positions,
            if `ctc` requests them or the LLM does not read blanks.
        """
        is_audio = input_ids == self.config.audio_token_id
        # The LLM's embedding may have no row for the audio's token, and needs none.
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        if input_features is None or audio_lengths is None:
            return embeddings, attention_mask, None
        features = self.get_audio_features(input_features, audio_lengths, is_audio.sum(1).tolist())
        assert features.pooler_output is not None, "get_audio_features sets it"
        audio = features.pooler_output.to(embeddings.device, embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_audio.unsqueeze(-1), audio)
        if not (ctc or self.config.drop_blanks):
            return embeddings, attention_mask, None
        logits = ctc_logits(features.pooler_output, self.config, self.llm.get_input_embeddings())
        if self.config.drop_blanks:
            attention_mask = without_blanks(attention_mask, is_audio, logits, self.config.drop_blanks)
        return embeddings, attention_mask, logits

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input_ids: [rows, positions], with `audio_token_id` where the audio is.
            attention_mask: [rows, positions], 0 on padding.
            input_features: as for `get_audio_features`.
            audio_lengths: as for `get_audio_features`.
            labels: [rows, positions], -100 at positions without a target.
            kwargs: further arguments of the LLM.

        Returns:
            The LLM's output: `logits` [rows, positions, vocabulary], and `loss` if there are labels.
        """
        embeddings, attention_mask, _ = self._embed(input_ids, attention_mask, input_features, audio_lengths)
        if attention_mask is not None and "position_ids" in inspect.signature(self.llm.forward).parameters:
            # Position ids start at 0 with each row's first token. `clamp` changes the padding before it from
            # -1, an invalid index, to 0.
            kwargs.setdefault("position_ids", (attention_mask.cumsum(1) - 1).clamp(min=0))
        return self.llm(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        ctc_weight: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transcribe.

        Args:
            input_ids: as for `forward`, padded on the left.
            attention_mask: as for `forward`.
            input_features: as for `get_audio_features`.
            audio_lengths: as for `get_audio_features`.
            generation_config: beams, penalties and limits; by default those of the folder.
            ctc_weight: CTC's share of the scores, by default that of config.json; 0 for the LLM alone.
            kwargs: options that replace those of `generation_config`, and further arguments of `generate`.

        Returns:
            Token ids [rows · answers, positions]: the input, followed by the answer. The repetition penalty
            applies to the answer's tokens only.
        """
        weight = require_ctc_weight(self.config.ctc_weight if ctc_weight is None else ctc_weight, self.config)
        embeddings, attention_mask, logits = self._embed(
            input_ids, attention_mask, input_features, audio_lengths, ctc=weight > 0
        )
        config = copy.deepcopy(generation_config or self.generation_config)
        arguments = config.update(**kwargs)
        processors = LogitsProcessorList(arguments.pop("logits_processor", None) or [])
        if config.repetition_penalty not in (None, 1.0):
            # `generate` itself would exempt the answer's first n tokens from the penalty, where n is the
            # number of the utterance's padding positions.
            processors.insert(0, RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
            config.repetition_penalty = 1.0
        if weight and logits is not None:
            positions = (input_ids == self.config.audio_token_id).sum(1).tolist()
            processors.append(CtcPrefixProcessor(logits, positions, self.config, weight, config))
        # This replaces the LLM's own configuration, from which `generate` would take the options that
        # `config` does not set.
        self.llm.generation_config = config
        output = self.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            **arguments,
        )
        answers = output if isinstance(output, torch.Tensor) else output.sequences
        # If `generate` gets embeddings, it returns only the answers, several per row if requested.
        heads = input_ids.repeat_interleave(len(answers) // len(input_ids), 0)
        sequences = torch.cat([heads, answers.to(heads.device)], 1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output


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


def _as_dtype(dtype: Any) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
