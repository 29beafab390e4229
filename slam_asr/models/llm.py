"""The language model: any causal LM of transformers, frozen unless the recipe says otherwise.

The code has no table of LLM families. Where families differ (embedding and output layers, names of linear
layers, number of positions), it asks the loaded model or its configuration.
"""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from slam_asr.config.recipe import Llm, Lora
from slam_asr.config.schema import nearest, one_sentence
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.meta_llm import zero_placeholders
from slam_asr.pretrained.model_config import own_code_refused, read_model_config
from slam_asr.pretrained.weight_checks import require_weights

if TYPE_CHECKING:
    from peft import LoraConfig


def load_llm(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal LM on the CPU, frozen and in evaluation mode.

    Args:
        folder: contains the LLM's files in transformers' format.
        dtype: dtype of the weights.
        trust_remote_code: whether the LLM's own Python code may run.

    Raises:
        ModelError: the folder has no causal LM that transformers can read, or weights are missing or damaged.
    """
    return load_weights(AutoModelForCausalLM, folder, dtype, "LLM", trust_remote_code=trust_remote_code)


def describe_llm(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the LLM without its weights, on the meta device.

    Args:
        folder: contains the LLM's config.json.
        trust_remote_code: whether the LLM's own Python code may run.

    Raises:
        ModelError: the folder's config.json is not that of a causal LM.
    """
    return build_llm(read_model_config(folder, "LLM", trust_remote_code), folder, trust_remote_code)


def build_llm(
    config: PretrainedConfig, folder: Path | str, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Build an LLM from its configuration, on the meta device.

    Args:
        config: the LLM's configuration.
        folder: the LLM's folder or name, for error messages.
        trust_remote_code: whether the LLM's own Python code may run.
        options: further arguments of transformers' `from_config`.

    Raises:
        ModelError: the configuration is not that of a causal LM.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    # Model classes raise various exceptions for invalid sizes, and the LLM's own code may raise anything.
    except Exception as error:
        raise own_code_refused(Path(folder), "LLM", error) or ModelError(
            f"config.json in {folder} cannot be built as a causal LM: {one_sentence(error)}"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the LLM's tokenizer.

    Args:
        folder: contains the tokenizer's files.
        trust_remote_code: whether the LLM's own Python code may run.

    Raises:
        ModelError: the folder has no readable tokenizer; or the tokenizer needs the LLM's own Python code,
            which is not trusted; or it belongs to another LLM.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # A missing file can surface as OSError, ValueError, TypeError, KeyError or ImportError.
    except Exception as error:
        raise own_code_refused(folder, "LLM", error) or ModelError(
            f"The LLM in {folder} has no tokenizer that can be read (tokenizer.json, tokenizer_config.json): "
            f"{one_sentence(error)}"
        ) from error
    # If files are missing, some classes do not raise, but return a tokenizer with special tokens only.
    only_special = len(tokenizer) == len(tokenizer.all_special_ids)
    if only_special or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(
            f"The LLM in {folder} has no tokenizer (tokenizer.json, tokenizer_config.json): "
            "add its files there."
        )
    if (Path(folder) / "config.json").is_file():
        _require_embeddings(tokenizer, folder, read_model_config(folder, "LLM", trust_remote_code))
    return tokenizer


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, folder: Path, config: PretrainedConfig) -> None:
    """Refuse a tokenizer that produces token ids for which the LLM has no embedding.

    Special tokens other than bos and eos may lack an embedding: many tokenizers have a padding token that was
    added later and never occurs in text.

    Raises:
        ModelError: the tokenizer belongs to another LLM.
    """
    # The configuration of a model that also reads images has a nested configuration for its LLM.
    embeddings = getattr(config.get_text_config(), "vocab_size", math.inf)
    unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = (unused | set(tokenizer.all_special_ids)) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= embeddings and i not in unused]
    if beyond:
        raise ModelError(
            f"The tokenizer in {folder} has {len(beyond)} tokens, such as {min(beyond)!r}, for which the LLM "
            f"has no embedding (it has {embeddings}): it belongs to another LLM; fetch the model again."
        )


def require_usable_llm(folder: Path, options: Llm) -> PreTrainedTokenizerBase:
    """Check an LLM's configuration, tokenizer and weight files, without reading the values of the weights.

    Args:
        folder: contains the LLM's files in transformers' format.
        options: the recipe's `llm` section; only `trust_remote_code` is used.

    Returns:
        The tokenizer.

    Raises:
        ModelError: a file is missing or damaged, or does not fit the others.
    """
    trust = options.trust_remote_code
    read_model_config(folder, "LLM", trust)
    tokenizer = load_tokenizer(folder, trust)
    require_weights(AutoModelForCausalLM, folder, "LLM", trust)
    return tokenizer


def llm_positions(folder: Path, trust_remote_code: bool = False) -> int | None:
    """Return the maximum number of positions that the LLM's configuration allows; None if it sets no limit.

    Args:
        folder: contains the LLM's config.json.
        trust_remote_code: whether the LLM's own Python code may run.

    Raises:
        ModelError: the folder has no readable config.json.
    """
    config = read_model_config(folder, "LLM", trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def llm_width(llm: PreTrainedModel) -> int:
    """Return the width of the LLM's input embeddings (d_llm)."""
    return cast(int, llm.get_input_embeddings().embedding_dim)


def set_tuning(llm: PreTrainedModel, options: Llm, seed: int) -> None:
    """Freeze the LLM, add adapters to it, or make all of it trainable, according to `options.tuning`.

    Args:
        llm: changed in place.
        options: the recipe's `llm` section.
        seed: determines the adapters' initial weights.
    """
    # This call must come before adapters are added; otherwise it would freeze them too.
    llm.requires_grad_(options.tuning == "full")
    if options.tuning == "lora":
        add_lora(llm, options.lora, seed)


def add_lora(llm: PreTrainedModel, options: Lora, seed: int) -> None:
    """Add trainable low-rank adapters to the linear layers named in `options`.

    The method is LoRA (Hu et al., 2021, arXiv:2106.09685). All other weights are frozen. The adapters'
    initial weights depend only on the seed. They are allocated and initialised even if this process holds the
    LLM's own weights only on the meta device.

    Raises:
        ConfigurationError: a name in `options.targets` matches none of the LLM's linear layers.
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
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        # Adapters change no bias, so the frozen LLM without them is exactly the base model.
        bias="none",
    )


def require_targets(llm: PreTrainedModel, options: Lora) -> None:
    """Check that the LLM has the linear layers that the recipe adds adapters to.

    The check works with and without the LLM's weights.

    Raises:
        ConfigurationError: a name in `options.targets` matches none of the LLM's linear layers.
    """
    # GPT-2's linear layers have transposed weights and a class of their own.
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = llm.named_modules()
    linear = sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, kinds)})
    # peft raises only if none of the names matches, so it would ignore one mistyped name among several.
    absent = [t for t in options.targets if t not in linear]
    if absent:
        raise ConfigurationError(
            f"llm.lora.targets names {absent[0]}, a layer that this LLM does not have"
            f"{nearest(absent[0], linear) or '.'} "
            f"Its linear layers: {', '.join(linear)}."
        )


def checkpoint_layers(model: nn.Module) -> None:
    """Turn on gradient checkpointing for every layer.

    Only the layer's input is saved in the forward pass, and the layer is recomputed in the backward pass.
    transformers' own switch has an effect only in training mode, in which a frozen LLM would apply dropout.

    Raises:
        ConfigurationError: none of the model's layers supports gradient checkpointing.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"training.gradient_checkpointing is true, but {type(model).__name__} has no layers that support "
            "it: set --training.gradient_checkpointing false."
        )
    for layer in layers:
        # The re-entrant variant rejects keyword arguments, and transformers calls its layers with some.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
