"""Loading pretrained weights: whole, finite and frozen, or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from slam_asr.configuration import one_sentence
from slam_asr.errors import UserError
from slam_asr.models.pretrained import UNREADABLE_WEIGHTS


def load_weights(
    kind: type, folder: Path, dtype: torch.dtype, part: str, values: bool = True
) -> PreTrainedModel:
    """A pretrained model with all its weights, frozen, in evaluation mode.

    Args:
        kind: one of transformers' Auto classes.
        folder: with transformers' files.
        dtype: of the weights.
        part: what to call it in a complaint: `encoder` or `LLM`.
        values: False to read no values: weights and buffers are on the meta device then.

    Raises:
        UserError: weights are missing, damaged, of another shape, or not finite.
    """
    device = {} if values else {"device_map": "meta"}
    with _quiet(), loading_fails_in_a_sentence(folder, part):
        # Weights of another shape are reported, rather than raised in a table of many lines.
        model, report = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **device
        )
    wrong = {str(key[0]) for key in report["mismatched_keys"]}
    # The mask's embedding serves pretraining alone; not every checkpoint keeps it.
    wrong |= {name for name in report["missing_keys"] if not name.endswith("masked_spec_embed")}
    if wrong:
        raise UserError(
            f"The weights of the {part} in {folder} do not fit its config.json ({len(wrong)} are missing or of another shape, "
            f"such as {min(wrong)}): fetch or convert the model again."
        )
    if values:
        require_finite(model, f"The {part} in {folder}")
    return model.eval().requires_grad_(False)


def require_finite(model: nn.Module, what: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        UserError: naming the first such weight.
    """
    for name, weight in model.named_parameters():
        require_finite_weight(name, weight.detach(), what)


def require_finite_weight(name: str, weight: torch.Tensor, what: str) -> None:
    """The same for one weight, or a part of it."""
    if not is_finite(weight):
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinite) in {name}: fetch or convert it again."
        )


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # NaN is both, infinity one of the two; nothing is copied, and half precision takes a tenth of what a sum does.
    return not weight.numel() or all(bound.isfinite() for bound in torch.aminmax(weight))


@contextlib.contextmanager
def loading_fails_in_a_sentence(folder: Path, part: str) -> Iterator[None]:
    """Turn what is raised over damaged files into a `UserError`.

    Args:
        folder: with the files.
        part: what to call it: `encoder` or `LLM`.
    """
    try:
        yield
    except UNREADABLE_WEIGHTS as error:
        raise UserError(f"The {part} in {folder} cannot be loaded: {one_sentence(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # transformers' bars and reports would tear the stage's own log; what matters of them is checked above.
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
