"""Loads pretrained models. All weights must be present and finite; they are frozen after loading."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError
from slam_asr.pretrained.lazy_tensors import is_finite
from slam_asr.pretrained.model_config import own_code_refused

_UNREADABLE = (OSError, ValueError, LookupError, ImportError, EOFError, SafetensorError, UnpicklingError)
"""Exceptions that transformers, safetensors and torch raise for weights that are damaged or unsuitable."""


def load_weights(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    part: str,
    values: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a pretrained model with all its weights, frozen, in evaluation mode.

    Args:
        kind: one of transformers' Auto classes, or a model class. The type is Any, because these classes
            share no base class with `from_pretrained`.
        folder: a folder with transformers' files.
        dtype: dtype of the weights.
        part: `encoder` or `LLM`, for error messages.
        values: whether to read the values. If False, weights and buffers are on the meta device, and it is
            not checked whether they are finite.
        trust_remote_code: whether code in the folder may run.

    Returns:
        The model, on the CPU unless `values` is False.

    Raises:
        ModelError: weights are missing, damaged, of another shape, or not finite; or the folder's code would
            have to run but is not trusted.
    """
    if not values:
        # transformers needs accelerate for a device map. Importing it here puts it into the steps' images,
        # which contain only packages that their code imports.
        import accelerate  # noqa: F401
    with _quiet(), load_errors_as_model_errors(folder, part):
        # With ignore_mismatched_sizes, weights of another shape are listed in the report. Without it,
        # transformers raises an exception whose text is a table of many lines.
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            device_map=None if values else "meta",
        )
    wrong = {str(key[0]) for key in report["mismatched_keys"]}
    # Only pretraining uses the embedding of masked frames, so checkpoints that lack it are accepted.
    wrong |= {name for name in report["missing_keys"] if not name.endswith("masked_spec_embed")}
    if wrong:
        raise ModelError(
            f"The weights of the {part} in {folder} do not fit its config.json ({len(wrong)} are missing or "
            f"have another shape, such as {min(wrong)}): fetch or convert the model again."
        )
    for name, weight in model.named_parameters() if values else ():
        require_finite_weight(name, weight.detach(), f"The {part} in {folder}")
    return model.eval().requires_grad_(False)


def require_finite_weight(
    name: str, weight: torch.Tensor, what: str, remedy: str = "fetch or convert the model again"
) -> None:
    """Refuse a weight that contains NaN or infinity.

    Args:
        name: the weight's name, for the error message.
        weight: the weight or some of its rows, of any shape and floating-point dtype.
        what: the beginning of the error message, such as `The LLM in /models/llm`.
        remedy: the end of the error message: what the user can do.

    Raises:
        ModelError: the weight is not finite.
    """
    if not is_finite(weight):
        raise ModelError(f"{what} holds values that are not finite (NaN or infinite) in {name}: {remedy}.")


@contextlib.contextmanager
def load_errors_as_model_errors(folder: Path, part: str) -> Iterator[None]:
    """Turn exceptions about damaged or unknown files into a `ModelError`.

    Args:
        folder: the folder with the files, for the message.
        part: `encoder` or `LLM`, for the message.
    """
    try:
        yield
    except _UNREADABLE as error:
        raise own_code_refused(folder, part, error) or ModelError(
            f"The {part} in {folder} cannot be loaded: {one_sentence(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # transformers' progress bars and loading reports would break up the stage's log lines. `load_weights`
    # itself checks the important parts of the report.
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
