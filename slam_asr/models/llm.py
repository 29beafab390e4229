"""The frozen language model: any causal LM of transformers."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slam_asr.errors import UserError
from slam_asr.models.pretrained import UNREADABLE_WEIGHTS
from slam_asr.recipe import one_sentence

# Its bars for the loading of weights would tear the stage's own log.
transformers.utils.logging.disable_progress_bar()


def load_llm(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal LM, frozen.

    Raises:
        UserError: the folder holds no causal LM that transformers can read.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"The LLM in {folder} cannot be loaded: {one_sentence(error)}") from error
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The LLM in {folder} has no tokenizer that can be read (tokenizer.json, tokenizer_config.json): "
            f"{one_sentence(error)}"
        ) from error


def llm_positions(folder: Path) -> int | None:
    """Positions that the LLM can hold, from the configuration alone; None where it does not say."""
    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise UserError(f"The LLM in {folder} has no readable config.json: {one_sentence(error)}") from error
