"""Weights of LLM and encoder that were trained with the projector."""

from pathlib import Path

import torch
from transformers import AutoModel

from slam_asr.conversion.model import ENCODER, load_into, require_fitting
from slam_asr.models.encoder import describe_encoder
from slam_asr.models.llm import add_lora, describe_llm, load_llm, load_tokenizer
from slam_asr.models.precision import DTYPES
from slam_asr.models.pretrained import locate_model
from slam_asr.models.weights import load_weights
from slam_asr.recipe import Recipe


def check_adapter(weights: dict[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Compare a LoRA adapter with the LLM that it is for, without the LLM's weights.

    Raises:
        UserError: weights are missing, unknown, of another shape, or not finite.
    """
    llm = describe_llm(locate_model(recipe.llm.name))
    add_lora(llm, recipe.llm.lora, seed=0)
    require_fitting(llm, weights, where, [n for n, _ in llm.named_parameters() if ".lora_" in n])


def write_tuned_llm(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Write the whole LLM with its tokenizer into a folder, in the precision that it was trained in.

    Raises:
        UserError: the weights are not those of the recipe's LLM.
    """
    base = locate_model(recipe.llm.name)
    llm = load_llm(base, DTYPES[recipe.training.precision])
    load_into(llm, weights, where, [n for n, _ in llm.named_parameters()])
    llm.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def write_merged_llm(folder: Path, adapter: dict[str, torch.Tensor], recipe: Recipe) -> None:
    """Write the LLM with a LoRA adapter merged into it, and its tokenizer, in the precision that it was trained in; merged in fp32."""
    base = locate_model(recipe.llm.name)
    llm = load_llm(base, torch.float32)
    add_lora(llm, recipe.llm.lora, seed=0)
    llm.load_state_dict(adapter, strict=False)
    for name, module in list(llm.named_modules()):
        if hasattr(module, "get_delta_weight"):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(llm.get_submodule(parent), last, module.get_base_layer())
    llm.to(DTYPES[recipe.training.precision]).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def write_tuned_encoder(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe, where: str) -> None:
    """Write the checkpoint's model with the trained encoder in it, and the preprocessor's configuration.

    Raises:
        UserError: the weights are not those of the recipe's encoder.
    """
    spec = describe_encoder(recipe.encoder)
    whole = load_weights(AutoModel, spec.folder, DTYPES[recipe.training.precision], "encoder")
    encoder = spec.encoder_of(whole)
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    load_into(encoder, own, where, [n for n, _ in encoder.named_parameters()])
    whole.save_pretrained(folder / ENCODER)
    preprocessor = spec.folder / "preprocessor_config.json"
    if preprocessor.is_file():
        (folder / ENCODER / preprocessor.name).write_bytes(preprocessor.read_bytes())
