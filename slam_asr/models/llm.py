"""The language model: any causal LM of transformers, frozen unless the recipe says otherwise.

The code has no table of LLM families. Where families differ (embedding and output layers, names of linear
layers, number of positions), it asks the loaded model or its configuration.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, cast

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

from slam_asr.config.recipe import Llm, Lora
from slam_asr.config.schema import nearest, one_sentence
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.meta_llm import zero_placeholders

if TYPE_CHECKING:
    from peft import LoraConfig


def load_llm(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal LM, frozen and in evaluation mode.

    Args:
        folder: contains the LLM's files in transformers' format.
        dtype: dtype of the weights.
        device: device that the weights are moved to.

    Raises:
        ModelError: the folder has no causal LM that transformers can read, or weights are missing or damaged.
    """
    llm = load_weights(AutoModelForCausalLM, folder, dtype, "LLM")
    cast(nn.Module, llm).to(device)  # transformers wraps `to` in a way that hides its signature
    return llm


def describe_llm(folder: Path) -> PreTrainedModel:
    """Build the LLM without its weights, on the meta device.

    Raises:
        ModelError: the folder's config.json is not that of a causal LM.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"The LLM in {folder} has no config.json of a causal LM: {one_sentence(error)}"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the LLM's tokenizer.

    Raises:
        ModelError: the folder has no readable tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # A missing file surfaces as any of OSError, ValueError, TypeError, KeyError and ImportError.
    except Exception as error:
        raise ModelError(
            f"The LLM in {folder} has no tokenizer that can be read (tokenizer.json, tokenizer_config.json): "
            f"{one_sentence(error)}"
        ) from error
    # If files are missing, some classes do not raise, but return a tokenizer with special tokens only.
    if len(tokenizer) == len(tokenizer.all_special_ids) or not tokenizer.encode(
        "a", add_special_tokens=False
    ):
        raise ModelError(
            f"The LLM in {folder} has no tokenizer (tokenizer.json, tokenizer_config.json): "
            "add its files there."
        )
    return tokenizer


def llm_positions(folder: Path) -> int | None:
    """Return the maximum number of positions that the LLM's configuration allows; None if it sets no limit.

    Raises:
        ModelError: the folder has no readable config.json.
    """
    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise ModelError(f"The LLM in {folder} has no readable config.json: {one_sentence(error)}") from error


def llm_width(llm: PreTrainedModel) -> int:
    """Return the width of the LLM's input embeddings (d_llm)."""
    width = llm.get_input_embeddings().embedding_dim
    assert isinstance(width, int)
    return width


def set_tuning(llm: PreTrainedModel, options: Llm, seed: int) -> None:
    """Freeze the LLM, add adapters to it, or make all of it trainable, according to `options.tuning`."""
    # This call must come before adapters are added: it would freeze them too.
    llm.requires_grad_(options.tuning == "full")
    if options.tuning == "lora":
        add_lora(llm, options.lora, seed)


def add_lora(llm: PreTrainedModel, options: Lora, seed: int) -> None:
    """Add trainable low-rank adapters to the linear layers named in `options`.

    The method is LoRA (Hu et al., 2021, arXiv:2106.09685). All other weights are frozen. The adapters'
    initial weights depend only on the seed. They are real even if the LLM's own weights are not in this
    process.

    Raises:
        ConfigurationError: the LLM has no linear layer of a name in `options`.
    """
    from peft import inject_adapter_in_model

    require_targets(llm, options)
    with torch.random.fork_rng(devices=[]), zero_placeholders(llm):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(options), llm)


def lora_config(options: Lora) -> "LoraConfig":
    """Translate the recipe's section `llm.lora` into peft's configuration."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # declared int, used as a factor
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        bias="none",
    )


def require_targets(llm: PreTrainedModel, options: Lora) -> None:
    """Check that the LLM has the linear layers that the recipe adds adapters to.

    The check works with and without the LLM's weights.

    Raises:
        ConfigurationError: the LLM has no linear layer of a name in `options`.
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
        raise ConfigurationError(
            f"llm.lora.targets names {absent[0]}, a layer that this LLM does not have"
            f"{nearest(absent[0], linear) or '.'} "
            f"Its linear layers: {', '.join(linear)}."
        )


def _linear_layers() -> tuple[type, ...]:
    # GPT-2's linear layers have transposed weights and a class of their own.
    return nn.Linear, transformers.pytorch_utils.Conv1D


def checkpoint_layers(model: nn.Module) -> None:
    """Save only each layer's input in the forward pass, and recompute the layer in the backward pass.

    transformers' own switch has an effect only in training mode, in which a frozen LLM would apply dropout.

    Raises:
        ConfigurationError: none of the model's layers supports this.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"training.gradient_checkpointing is true, but {type(model).__name__} has no layers that allow it"
            ": set it to false."
        )
    for layer in layers:
        # The re-entrant variant rejects keyword arguments, and transformers calls its layers with some.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
