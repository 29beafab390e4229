"""Loads pretrained weights: complete, finite and frozen, or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError
from slam_asr.pretrained.lazy_tensors import is_finite
from slam_asr.pretrained.locate import UNREADABLE_WEIGHTS


def load_weights(
    kind: Any, folder: Path, dtype: torch.dtype, part: str, values: bool = True
) -> PreTrainedModel:
    """Load a pretrained model with all its weights, frozen, in evaluation mode.

    Args:
        kind: one of transformers' Auto classes; they share no base class that has `from_pretrained`.
        folder: with transformers' files.
        dtype: of the weights.
        part: `encoder` or `LLM`, for error messages.
        values: False leaves weights and buffers on the meta device, and reads no values.

    Raises:
        ModelError: weights are missing, damaged, of another shape, or not finite.
    """
    device = {} if values else {"device_map": "meta"}
    with _quiet(), load_errors_as_model_errors(folder, part):
        # With ignore_mismatched_sizes, weights of another shape are in the report. Otherwise transformers
        # raises an exception whose text is a table of many lines.
        model, report = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **device
        )
    wrong = {str(key[0]) for key in report["mismatched_keys"]}
    # Only pretraining uses the embedding of masked frames, and some checkpoints lack it.
    wrong |= {name for name in report["missing_keys"] if not name.endswith("masked_spec_embed")}
    if wrong:
        raise ModelError(
            f"The weights of the {part} in {folder} do not fit its config.json ({len(wrong)} are missing or "
            f"have another shape, such as {min(wrong)}): fetch or convert the model again."
        )
    if values:
        require_finite(model, f"The {part} in {folder}")
    return model.eval().requires_grad_(False)


def require_finite(model: nn.Module, what: str) -> None:
    """Refuse a model with weights that are NaN or infinite.

    Args:
        model: with its weights.
        what: begins the error message, such as `The LLM in /models/llm`.

    Raises:
        ModelError: with the name of the first such weight.
    """
    for name, weight in model.named_parameters():
        require_finite_weight(name, weight.detach(), what)


def require_finite_weight(name: str, weight: torch.Tensor, what: str) -> None:
    """Like `require_finite`, for one weight or some of its rows, of any shape."""
    if not is_finite(weight):
        raise ModelError(
            f"{what} holds values that are not finite (NaN or infinite) in {name}: "
            "fetch or convert the model again."
        )


@contextlib.contextmanager
def load_errors_as_model_errors(folder: Path, part: str) -> Iterator[None]:
    """Turn exceptions about damaged or unknown files into a `ModelError`.

    Args:
        folder: with the files.
        part: `encoder` or `LLM`, for the message.
    """
    try:
        yield
    except UNREADABLE_WEIGHTS as error:
        raise ModelError(f"The {part} in {folder} cannot be loaded: {one_sentence(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # transformers' progress bars and loading reports would break up the stage's log lines. The caller checks
    # what is important in the reports.
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
