"""Loads and writes LLMs and encoders that were trained together with the projector."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from slam_asr.artifacts.model_folder import replace_weights, require_matching_weights
from slam_asr.conversion.parts import Parts
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import add_lora, load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES
from slam_asr.pretrained.lazy_tensors import LazyTensors, join_tensors, write_one_by_one
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.meta_llm import LazyWeight, NotLazilyLoadable, describe_lazy_llm


class _AdaptedLayer(Protocol):
    """The methods of peft's adapted layers that this module calls; peft does not declare their types."""

    def merge(self) -> None: ...

    def get_base_layer(self) -> nn.Module: ...

    def get_delta_weight(self, adapter: str, /) -> torch.Tensor: ...


def load_trained_llm(parts: Parts, dtype: torch.dtype) -> PreTrainedModel:
    """Load the recipe's LLM, with its trained weights if it was trained.

    An adapter is merged into the LLM, in fp32.

    Args:
        parts: the weights and the recipe.
        dtype: dtype of the LLM's weights.

    Raises:
        ModelError: the weights are not those of the recipe's LLM.
    """
    options = parts.recipe.llm
    loaded_as = torch.float32 if parts.adapter else dtype
    llm = load_llm(locate_model(options.name), loaded_as, trust_remote_code=options.trust_remote_code)
    if not parts.adapter:
        if parts.llm:
            replace_weights(llm, parts.llm, parts.where, [n for n, _ in llm.named_parameters()])
        return llm
    for name, layer in _adapted(llm, parts).items():
        layer.merge()
        llm.set_submodule(name, layer.get_base_layer())
    return cast(PreTrainedModel, cast(nn.Module, llm).to(dtype))


def write_trained_llm(folder: Path, parts: Parts) -> None:
    """Write the trained LLM and its tokenizer, in the precision of the training.

    A LoRA adapter is merged into the LLM, in fp32. The weights are computed and written one by one, unless
    the base LLM cannot be loaded weight by weight; see `NotLazilyLoadable`.

    Args:
        folder: folder for the LLM.
        parts: all weights of the LLM or of its adapter, and the recipe.

    Raises:
        ModelError: the weights are not those of the recipe's LLM.
    """
    options, dtype = parts.recipe.llm, DTYPES[parts.recipe.training.precision]
    base, trust = locate_model(options.name), options.trust_remote_code
    try:
        llm, _ = describe_lazy_llm(base, dtype, trust)
    except NotLazilyLoadable:
        load_trained_llm(parts, dtype).save_pretrained(folder)
    else:
        if not parts.adapter:
            require_matching_weights(llm, parts.llm, parts.where, [n for n, _ in llm.named_parameters()])
        _write_llm(folder, llm, _merged_weights(base, parts) if parts.adapter else parts.llm)
    load_tokenizer(base, trust).save_pretrained(folder)
    # If the LLM's own Python code is trusted, it is part of the LLM.
    for code in base.glob("*.py") if trust else ():
        (folder / code.name).write_bytes(code.read_bytes())


def _adapted(llm: PreTrainedModel, parts: Parts) -> dict[str, _AdaptedLayer]:
    """Add the adapter to an LLM; return the layers that it adapts, keyed by name."""
    add_lora(llm, parts.recipe.llm.lora, seed=0)
    # `strict=False` is needed, because the LLM has many other weights; `divide` finds wrong or missing ones.
    llm.load_state_dict(parts.adapter, strict=False)
    return {
        name: cast(_AdaptedLayer, module)
        for name, module in llm.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def _merged_weights(base: Path, parts: Parts) -> LazyTensors:
    """Return the weights of the base LLM in fp32 with the adapter merged into them, keyed by name."""
    llm, weights = describe_lazy_llm(base, torch.float32, parts.recipe.llm.trust_remote_code)
    # Layers are found by their weight's identity: inside peft's layer, the weight has another name but is the
    # same object.
    layers = {id(layer.get_base_layer().weight): layer for layer in _adapted(llm, parts).values()}
    return LazyTensors({w.name: partial(_merged, w, layers.get(id(w.parameter))) for w in weights})


@torch.no_grad()
def _merged(weight: LazyWeight, layer: _AdaptedLayer | None) -> torch.Tensor:
    """Read a weight of the LLM in fp32, and add the change that its layer's adapter makes, if it has one."""
    values = weight.read_into(torch.empty(weight.parameter.shape))
    return values if layer is None else values.add_(layer.get_delta_weight("default"))


def _write_llm(folder: Path, llm: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Write an LLM as `save_pretrained` does, but with one weight in memory at a time.

    Args:
        folder: folder for config.json and model.safetensors.
        llm: on the meta device, in the dtype of the file.
        weights: the values, keyed by name in the LLM. A tied weight has only its first name, as in
            `named_parameters`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Unlike the weights, the buffers that a file needs already have their values.
    buffers = {name: buffer for name, buffer in llm.state_dict().items() if not buffer.is_meta}
    like = dict(llm.named_parameters()) | buffers
    write_one_by_one(folder / SAFE_WEIGHTS_NAME, join_tensors(weights, buffers), like)
    llm.config.architectures = [type(llm).__name__]
    llm.config.save_pretrained(folder)
    if llm.generation_config is not None:
        llm.generation_config.save_pretrained(folder)


def load_trained_encoder(spec: EncoderSpec, parts: Parts, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Load the recipe's encoder, with its trained weights if it was trained.

    Args:
        spec: describes the encoder.
        parts: the encoder's weights.
        dtype: dtype of the model's weights.

    Returns:
        The complete base model; and its encoder, a module whose class depends on the model.

    Raises:
        ModelError: the weights are not those of the recipe's encoder.
    """
    model = load_weights(AutoModel, spec.folder, dtype, "encoder")
    encoder = spec.encoder_of(model)
    if parts.encoder:
        replace_weights(encoder, parts.encoder, parts.where, [n for n, _ in encoder.named_parameters()])
    return model, encoder


def write_trained_encoder(folder: Path, parts: Parts) -> None:
    """Write the complete base model with the trained encoder in it, and the preprocessor's configuration.

    Args:
        folder: folder for the encoder.
        parts: the encoder's weights, and the recipe.

    Raises:
        ModelError: the weights are not those of the recipe's encoder.
    """
    spec = describe_encoder(parts.recipe.encoder)
    model, _ = load_trained_encoder(spec, parts, DTYPES[parts.recipe.training.precision])
    model.save_pretrained(folder)
    preprocessor = spec.folder / "preprocessor_config.json"
    if preprocessor.is_file():
        (folder / preprocessor.name).write_bytes(preprocessor.read_bytes())
