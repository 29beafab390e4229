"""Writes LLMs and encoders that were trained together with the projector."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from slam_asr.artifacts.model_folder import ENCODER, replace_weights, require_matching_weights
from slam_asr.config.recipe import Recipe
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import add_lora, describe_llm, load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES
from slam_asr.pretrained.lazy_tensors import LazyTensors, write_one_by_one
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.meta_llm import LazyWeight, NotLazilyLoadable, describe_lazy_llm


class _AdaptedLayer(Protocol):
    """The methods of peft's adapted layers that this module calls; peft does not declare their types."""

    def merge(self) -> None: ...

    def get_base_layer(self) -> nn.Module: ...

    def get_delta_weight(self, adapter: str, /) -> torch.Tensor: ...


def check_adapter(weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Check that a LoRA adapter fits the recipe's LLM, without loading the LLM's weights.

    Args:
        weights: the adapter's weights, keyed by name in the LLM.
        recipe: names the LLM, and the rank and the targets of the adapter.
        where: the checkpoint, for error messages.

    Raises:
        ModelError: weights are missing, unknown, of another shape, or not finite.
    """
    llm = describe_llm(locate_model(recipe.llm.name), recipe.llm.trust_remote_code)
    add_lora(llm, recipe.llm.lora, seed=0)
    require_matching_weights(llm, weights, where, [n for n, _ in llm.named_parameters() if ".lora_" in n])


def write_tuned_llm(folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Write a fully trained LLM and its tokenizer, in the precision of the training.

    The weights are written one by one, unless the base LLM cannot be loaded weight by weight; see
    `NotLazilyLoadable`.

    Args:
        folder: folder for the LLM.
        weights: all weights of the LLM, keyed by name in it.
        recipe: the training's recipe.
        where: the checkpoint, for error messages.

    Raises:
        ModelError: the weights are not those of the recipe's LLM.
    """
    base, dtype = locate_model(recipe.llm.name), DTYPES[recipe.training.precision]
    trust = recipe.llm.trust_remote_code
    try:
        llm, _ = describe_lazy_llm(base, dtype, trust)
    except NotLazilyLoadable:
        llm = load_llm(base, dtype, trust_remote_code=trust)
        replace_weights(llm, weights, where, [n for n, _ in llm.named_parameters()])
        llm.save_pretrained(folder)
    else:
        require_matching_weights(llm, weights, where, [n for n, _ in llm.named_parameters()])
        _write_llm(folder, llm, weights)
    _copy_other_files(base, folder, trust)


def write_merged_llm(folder: Path, adapter: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    """Write the LLM with a LoRA adapter merged into it, and its tokenizer, in the precision of the training.

    Merging is done in fp32. The weights are merged and written one by one, unless the base LLM cannot be
    loaded weight by weight; see `NotLazilyLoadable`.

    Args:
        folder: folder for the LLM.
        adapter: LoRA's weights, keyed by name in the LLM.
        recipe: the training's recipe.
    """
    base, dtype = locate_model(recipe.llm.name), DTYPES[recipe.training.precision]
    trust = recipe.llm.trust_remote_code
    try:
        llm, lazy_weights = describe_lazy_llm(base, torch.float32, trust)
    except NotLazilyLoadable:
        load_merged_llm(adapter, recipe).to(dtype).save_pretrained(folder)
    else:
        # `_adapted` adds peft's layers to `llm`, so a second description gives the names for the file.
        written, _ = describe_lazy_llm(base, dtype, trust)
        # Layers are found by their weight's identity: inside peft's layer, the weight has another name but is
        # the same object.
        layers = {
            id(layer.get_base_layer().weight): layer for layer in _adapted(llm, adapter, recipe).values()
        }
        makers = {
            weight.name: partial(_merged, weight, layers.get(id(weight.parameter))) for weight in lazy_weights
        }
        _write_llm(folder, written, LazyTensors(makers))
    _copy_other_files(base, folder, trust)


def load_merged_llm(adapter: Mapping[str, torch.Tensor], recipe: Recipe) -> PreTrainedModel:
    """Load the recipe's LLM in fp32, and merge a LoRA adapter into it.

    Args:
        adapter: LoRA's weights, keyed by name in the LLM.
        recipe: names the LLM, and the rank, the alpha and the targets of the adapter.
    """
    llm = load_llm(
        locate_model(recipe.llm.name), torch.float32, trust_remote_code=recipe.llm.trust_remote_code
    )
    for name, layer in _adapted(llm, adapter, recipe).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(llm.get_submodule(parent), last, layer.get_base_layer())
    return llm


def _copy_other_files(base: Path, folder: Path, trust_remote_code: bool) -> None:
    """Write the base LLM's tokenizer and, if it is trusted, its own Python code next to the weights."""
    load_tokenizer(base, trust_remote_code).save_pretrained(folder)
    for code in base.glob("*.py") if trust_remote_code else ():
        (folder / code.name).write_bytes(code.read_bytes())


def _adapted(
    llm: PreTrainedModel, adapter: Mapping[str, torch.Tensor], recipe: Recipe
) -> dict[str, _AdaptedLayer]:
    """Add an adapter to an LLM; return the layers that it adapts, keyed by name."""
    add_lora(llm, recipe.llm.lora, seed=0)
    # `strict=False` is needed, because the LLM has many other weights; `check_adapter` finds wrong or missing
    # ones.
    llm.load_state_dict(adapter, strict=False)
    return {
        name: cast(_AdaptedLayer, module)
        for name, module in llm.named_modules()
        if hasattr(module, "get_delta_weight")
    }


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
    write_one_by_one(
        folder / SAFE_WEIGHTS_NAME,
        # ChainMap only reads its second mapping, so an immutable one will do.
        ChainMap(buffers, cast(MutableMapping[str, torch.Tensor], weights)),
        dict(llm.named_parameters()) | buffers,
    )
    llm.config.architectures = [type(llm).__name__]
    llm.config.save_pretrained(folder)
    if llm.generation_config is not None:
        llm.generation_config.save_pretrained(folder)


def write_tuned_encoder(
    folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe, where: str
) -> None:
    """Write the complete base model with the trained encoder in it, and the preprocessor's configuration.

    Args:
        folder: the model's folder; the encoder is written to `encoder/` in it.
        weights: the encoder's weights, keyed by name in `SpeechEncoder`.
        recipe: the training's recipe.
        where: the checkpoint, for error messages.

    Raises:
        ModelError: the weights are not those of the recipe's encoder.
    """
    spec = describe_encoder(recipe.encoder)
    model = load_weights(AutoModel, spec.folder, DTYPES[recipe.training.precision], "encoder")
    encoder = spec.encoder_of(model)
    trained = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    replace_weights(encoder, trained, where, [n for n, _ in encoder.named_parameters()])
    model.save_pretrained(folder / ENCODER)
    preprocessor = spec.folder / "preprocessor_config.json"
    if preprocessor.is_file():
        (folder / ENCODER / preprocessor.name).write_bytes(preprocessor.read_bytes())
