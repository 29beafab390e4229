"""Weights of LLM and encoder that were trained with the projector."""

from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from slam_asr.conversion.model import ENCODER, replace_weights, require_matching_weights
from slam_asr.models.encoder import describe_encoder
from slam_asr.models.llm import add_lora, describe_llm, load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES
from slam_asr.models.pretrained import locate_model
from slam_asr.models.sharded import LazyWeight, NotLazilyLoadable, describe_lazy_llm
from slam_asr.models.tensors import LazyTensors, write_one_by_one
from slam_asr.models.weights import load_weights
from slam_asr.recipe import Recipe


def check_adapter(weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Compare a LoRA adapter with the LLM that it is for, without the LLM's weights.

    Raises:
        UserError: weights are missing, unknown, of another shape, or not finite.
    """
    llm = describe_llm(locate_model(recipe.llm.name))
    add_lora(llm, recipe.llm.lora, seed=0)
    require_matching_weights(llm, weights, where, [n for n, _ in llm.named_parameters() if ".lora_" in n])


def write_tuned_llm(folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Write the whole LLM with its tokenizer into a folder, in the precision that it was trained in; weight by weight where that is possible.

    Raises:
        UserError: the weights are not those of the recipe's LLM.
    """
    base, dtype = locate_model(recipe.llm.name), DTYPES[recipe.training.precision]
    try:
        llm, _ = describe_lazy_llm(base, dtype)
    except NotLazilyLoadable:
        llm = load_llm(base, dtype)
        replace_weights(llm, weights, where, [n for n, _ in llm.named_parameters()])
        llm.save_pretrained(folder)
    else:
        require_matching_weights(llm, weights, where, [n for n, _ in llm.named_parameters()])
        _write_llm(folder, llm, weights)
    load_tokenizer(base).save_pretrained(folder)


def write_merged_llm(folder: Path, adapter: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    """Write the LLM with a LoRA adapter merged into it, and its tokenizer, in the precision that it was trained in; merged in fp32, weight by weight where that is possible."""
    base, dtype = locate_model(recipe.llm.name), DTYPES[recipe.training.precision]
    try:
        llm, stored = describe_lazy_llm(base, torch.float32)
    except NotLazilyLoadable:
        llm = load_llm(base, torch.float32)
        for name, layer in _adapted(llm, adapter, recipe).items():
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(llm.get_submodule(parent), last, layer.get_base_layer())
        llm.to(dtype).save_pretrained(folder)
    else:
        written, _ = describe_lazy_llm(base, dtype)
        layers = {
            id(layer.get_base_layer().weight): layer for layer in _adapted(llm, adapter, recipe).values()
        }
        makers = {
            weight.name: partial(_merged, weight, layers.get(id(weight.parameter))) for weight in stored
        }
        _write_llm(folder, written, LazyTensors(makers))
    load_tokenizer(base).save_pretrained(folder)


def _adapted(
    llm: PreTrainedModel, adapter: Mapping[str, torch.Tensor], recipe: Recipe
) -> dict[str, nn.Module]:
    """Put an adapter on an LLM → its layers that have one now, by name."""
    add_lora(llm, recipe.llm.lora, seed=0)
    llm.load_state_dict(adapter, strict=False)
    return {name: module for name, module in llm.named_modules() if hasattr(module, "get_delta_weight")}


@torch.no_grad()
def _merged(weight: LazyWeight, layer: nn.Module | None) -> torch.Tensor:
    """A weight of the LLM, with what the adapter of its layer adds to it."""
    values = weight.read_into(torch.empty(weight.parameter.shape))
    return values if layer is None else values.add_(layer.get_delta_weight("default"))


def _write_llm(folder: Path, llm: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Write an LLM as `save_pretrained` does, which would want all of its weights at once.

    Args:
        folder: for config.json and model.safetensors.
        llm: without its weights, but with their precision.
        weights: by their names in it; a tied one once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Tied weights are written under their first name.
    buffers = {name: buffer for name, buffer in llm.state_dict().items() if not buffer.is_meta}
    write_one_by_one(
        folder / SAFE_WEIGHTS_NAME, ChainMap(buffers, weights), dict(llm.named_parameters()) | buffers
    )
    llm.config.architectures = [type(llm).__name__]
    llm.config.save_pretrained(folder)
    if llm.generation_config is not None:
        llm.generation_config.save_pretrained(folder)


def write_tuned_encoder(
    folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str
) -> None:
    """Write the checkpoint's model with the trained encoder in it, and the preprocessor's configuration.

    Raises:
        UserError: the weights are not those of the recipe's encoder.
    """
    spec = describe_encoder(recipe.encoder)
    whole = load_weights(AutoModel, spec.folder, DTYPES[recipe.training.precision], "encoder")
    encoder = spec.encoder_of(whole)
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    replace_weights(encoder, own, where, [n for n, _ in encoder.named_parameters()])
    whole.save_pretrained(folder / ENCODER)
    preprocessor = spec.folder / "preprocessor_config.json"
    if preprocessor.is_file():
        (folder / ENCODER / preprocessor.name).write_bytes(preprocessor.read_bytes())
