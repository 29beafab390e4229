"""Reads the configuration of a pretrained model, and refuses models that this program cannot load.

Some models on the hub bring Python code of their own. transformers asks on the terminal whether to run it,
unless its argument `trust_remote_code` is True or False. Here it is always one of the two: True only if the
user has allowed the code by `llm.trust_remote_code`, else False. So transformers never asks.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError

TRUST_KEY = "llm.trust_remote_code"
"""The recipe's key that allows an LLM's own code."""


def read_model_config(folder: Path, part: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config.json with transformers.

    Args:
        folder: a folder with transformers' files.
        part: `encoder` or `LLM`, for error messages.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ModelError: config.json cannot be read or needs code that is not trusted, or the model is quantised or
            an adapter.
    """
    folder = Path(folder)
    # transformers would load the base model that the adapter names.
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"The {part} in {folder} is a LoRA adapter (adapter_config.json): merge it into its base model, "
            "and give the folder of the merged model."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Configurations raise many kinds of errors for bad values (ValueError, KeyError, TypeError, …), and code
    # from the folder may raise anything.
    except Exception as error:
        raise own_code_refused(folder, part, error) or ModelError(
            f"The {part} in {folder} has no readable config.json: {one_sentence(error)}"
        ) from error
    quantised = _quantisation(folder, config)
    if quantised:
        raise ModelError(
            f"The {part} in {folder} is quantised ({quantised}), and quantised models cannot be used: "
            "give the model from which it was made, in bf16, fp16 or fp32."
        )
    # An attention of the form OWNER/REPOSITORY is code that transformers fetches from the hub.
    attention = str(getattr(config, "_attn_implementation", None))
    if "/" in attention and not trust_remote_code:
        raise _code_refusal(folder, part, f"attention from {attention}")
    return config


def own_code_refused(folder: Path, part: str, error: Exception) -> ModelError | None:
    """Return the error for a model that needs code of its own; None if transformers had another reason.

    Args:
        folder: the model's folder.
        part: `encoder` or `LLM`.
        error: the exception that transformers raised.
    """
    # transformers has no exception of its own for this.
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return _code_refusal(folder, part, "Python code of its own")
    return None


def _code_refusal(folder: Path, part: str, code: str) -> ModelError:
    remedy = (
        f"give another LLM or, if you trust that code, set --{TRUST_KEY} true"
        if part == "LLM"
        else "give a Whisper, WavLM, HuBERT or wav2vec 2.0 encoder in transformers' format"
    )
    return ModelError(f"The {part} in {folder} needs {code}, which is not run: {remedy}.")


def _quantisation(folder: Path, config: PretrainedConfig) -> str | None:
    """Return the name of the method by which a model is quantised, or None if it is not."""
    # Older quantisers write a file of their own instead of a key of config.json.
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            with contextlib.suppress(OSError, ValueError, RecursionError):
                return _method(json.loads((folder / name).read_text(encoding="utf-8"))) or name
            return name
    for section in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            found = getattr(section, key, None)
            if found:
                return _method(found) or key
    return None


def _method(found: Any) -> str | None:
    """Return the method's name in a quantiser's configuration, if it states one."""
    values = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    method = values.get("quant_method")
    return str(getattr(method, "value", method)) if method else None
