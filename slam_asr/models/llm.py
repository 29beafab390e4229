"""The language model: any causal LM of transformers, frozen unless the recipe says otherwise.

What differs between families is found out, not looked up by name: where the embedding and output
layers are, what the linear layers are called, how many positions there are.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from slam_asr.configuration import nearest, one_sentence
from slam_asr.errors import UserError
from slam_asr.models.sharded import stand_ins
from slam_asr.models.weights import load_weights
from slam_asr.recipe import Llm, Lora

if TYPE_CHECKING:
    from peft import LoraConfig

# Its bars for the loading of weights would tear the stage's own log.
transformers.utils.logging.disable_progress_bar()


def load_llm(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal LM, frozen.

    Raises:
        UserError: the folder holds no causal LM that transformers can read, or its weights are not whole.
    """
    return load_weights(AutoModelForCausalLM, folder, dtype, "LLM").to(device)


def describe_llm(folder: Path) -> PreTrainedModel:
    """The LLM without its weights, on the meta device.

    Raises:
        UserError: the folder's config.json is not that of a causal LM.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The LLM in {folder} has no config.json of a causal LM: {one_sentence(error)}"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (
        Exception
    ) as error:  # a missing file shows as any of OSError, ValueError, TypeError, KeyError, ImportError
        raise UserError(
            f"The LLM in {folder} has no tokenizer that can be read (tokenizer.json, tokenizer_config.json): "
            f"{one_sentence(error)}"
        ) from error
    if len(tokenizer) == len(tokenizer.all_special_ids) or not tokenizer.encode(
        "a", add_special_tokens=False
    ):
        raise UserError(
            f"The LLM in {folder} has no tokenizer (tokenizer.json, tokenizer_config.json): put its files there."
        )
    return tokenizer


def llm_positions(folder: Path) -> int | None:
    """Positions that the LLM can hold, from the configuration alone; None where it does not say."""
    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise UserError(f"The LLM in {folder} has no readable config.json: {one_sentence(error)}") from error


def llm_width(llm: PreTrainedModel) -> int:
    """d_llm: values a position."""
    return llm.get_input_embeddings().embedding_dim


def set_tuning(llm: PreTrainedModel, options: Llm, seed: int) -> None:
    """Freeze the LLM, give it adapters, or open all of it, as the recipe says."""
    llm.requires_grad_(options.tuning == "full")
    if options.tuning == "lora":
        add_lora(llm, options.lora, seed)


def add_lora(llm: PreTrainedModel, options: Lora, seed: int) -> None:
    """Put trainable low-rank adapters on the linear layers named in `options` (Hu et al., 2021, arXiv:2106.09685).

    The rest is frozen. Initial weights depend on the seed alone, and are there even where the LLM's own are not.
    """
    from peft import inject_adapter_in_model

    require_targets(llm, options)
    with torch.random.fork_rng(devices=[]), stand_ins(llm):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(options), llm)


def lora_config(options: Lora) -> "LoraConfig":
    """The recipe's section in peft's own words."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        bias="none",
    )


def require_targets(llm: PreTrainedModel, options: Lora) -> None:
    """Check that the LLM, with weights or without, has the layers that adapters are meant for.

    Raises:
        UserError: it has none of such a name.
    """
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in llm.named_modules()
            if isinstance(module, _linear_layers())
        }
    )
    absent = [t for t in options.targets if t not in linear]
    if absent:
        raise UserError(
            f"llm.lora.targets names {absent[0]}, a layer that this LLM does not have{nearest(absent[0], linear) or '.'} "
            f"Its linear layers: {', '.join(linear)}."
        )


def _linear_layers() -> tuple[type, ...]:
    # GPT-2 has its linear layers transposed, in a class of their own.
    return nn.Linear, transformers.pytorch_utils.Conv1D


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only each layer's input in the forward pass, and compute the layer again on the way back.

    transformers' own switch works in training mode alone, in which a frozen LLM would drop activations.

    Raises:
        UserError: the model has no layers that allow it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"training.gradient_checkpointing: {type(model).__name__} has no layers that allow it; set it to false."
        )
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
