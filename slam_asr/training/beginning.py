"""Checks the inputs of training with CTC, and builds the CTC head and the model of the beginning."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import samples_of
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.models.augmentation import Augmentation
from slam_asr.models.ctc import INITIAL_SHARPNESS, CtcHead
from slam_asr.models.ctc_vocabulary import CtcVocabulary, choose_tokens
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import load_llm
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.pretrained.meta_llm import NotLazilyLoadable, describe_lazy_llm
from slam_asr.progress import log_line
from slam_asr.training.ctc_model import CtcModel
from slam_asr.training.job import TrainingJob
from slam_asr.training.model_builder import build_initial_projector, load_frozen_encoder

MAX_WITHOUT_PATH = 0.5
"""Maximum share of the train utterances that CTC cannot align, because they have too few positions."""


def tokens_for_ctc(
    recipe: Recipe,
    encoder: EncoderSpec,
    tokenizer: PreTrainedTokenizerBase,
    utterances: Mapping[str, Sequence[Utterance]],
) -> list[int]:
    """Choose the tokens that CTC distinguishes, and check that CTC can align them with the train audio.

    Args:
        recipe: the training run's recipe.
        encoder: determines the number of frames.
        tokenizer: the LLM's tokenizer.
        utterances: the utterances that fit the encoder's window, by set (`train`, `dev`).

    Returns:
        Token ids, the blank's first.

    Raises:
        ConfigurationError: more than half of the train utterances have too few positions for their tokens; or
            the beginning ends at an error rate on dev (`projector.beginning.until`), but no dev set is given.
    """
    options = recipe.projector.beginning
    if options.until and "dev" not in utterances:
        raise ConfigurationError(
            "projector.beginning.until is an error rate on dev, but this training has no dev manifest: give "
            "one, or leave the key out."
        )
    train = utterances["train"]
    # Only tokens of the train set: a token that occurs in dev alone could never be learnt.
    token_ids = choose_tokens(tokenizer, (u.target for u in train))
    vocabulary = CtcVocabulary(tokenizer, token_ids)
    without_path = sum(
        _positions_needed(vocabulary.spell(u.target))
        > positions_of(recipe.projector, encoder.span_of(samples_of(u)))
        for u in train
    )
    if without_path > MAX_WITHOUT_PATH * len(train):
        raise ConfigurationError(
            f"{without_path} of {len(train)} train utterances have too few audio positions for their tokens, "
            f"so CTC cannot align them: lower projector.downsampling ({recipe.projector.downsampling}), or "
            "set projector.beginning.kind to none and projector.ctc_weight to 0."
        )
    if without_path:
        log_line(
            f"warning: CTC skips {without_path} of {len(train)} train utterances, which have too few audio "
            "positions for their tokens (projector.downsampling)"
        )
    return token_ids


def _positions_needed(tokens: list[int]) -> int:
    """Return the smallest number of positions that CTC needs: two equal tokens in a row need a blank between.

    Args:
        tokens: tokens of one utterance.
    """
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))


def build_ctc_model(job: TrainingJob, recipe: Recipe, device: torch.device) -> CtcModel:
    """Build the model of the beginning. The projector starts as in a training run without a beginning.

    Args:
        job: names the LLM's folder, the feature store, the tokens, and the model to start from.
        recipe: the training run's recipe.
        device: where the encoder is placed; the engine moves the other parts.

    Raises:
        UserError: weights cannot be used.
    """
    head, encoder_width = build_head(job, recipe), describe_encoder(recipe.encoder).width
    projector = build_initial_projector(job, recipe, encoder_width, head.embeddings.shape[1])
    encoder = load_frozen_encoder(job, recipe, device)
    augmentation = Augmentation(recipe.projector.beginning.dropout, recipe.projector.masks)
    return CtcModel(projector, head, encoder, recipe.features.dtype, augmentation)


def build_head(job: TrainingJob, recipe: Recipe, sharpness: float | None = None) -> CtcHead:
    """Build the CTC head for the job's tokens, in the recipe's precision.

    Args:
        job: names the LLM's folder, the tokens, and the sharpness to start from.
        recipe: the training run's recipe.
        sharpness: sharpness of the head. By default, it is that of the initial model's head, or else
            `INITIAL_SHARPNESS`.
    """
    dtype = DTYPES[recipe.training.precision]
    folder, trust = Path(job.llm_folder), recipe.llm.trust_remote_code
    head = CtcHead(token_embeddings(folder, job.ctc_tokens, dtype, trust), dtype)
    with torch.no_grad():
        head.log_sharpness.fill_(math.log(_sharpness(job, sharpness)))
    return head


def describe_head(job: TrainingJob, recipe: Recipe, sharpness: float | None) -> dict[str, Any]:
    """Return the CTC head as a model folder records it; empty if the model does not keep it.

    Args:
        job: names the tokens, and the sharpness of the initial model's head.
        recipe: the training run's recipe.
        sharpness: the sharpness that the beginning has learned; None without a beginning.
    """
    options = recipe.projector
    if options.ctc_weight > 0 or (options.beginning.active and options.beginning.keep_head):
        return {"tokens": job.ctc_tokens, "sharpness": _sharpness(job, sharpness)}
    return {}


def _sharpness(job: TrainingJob, learned: float | None) -> float:
    return learned or job.ctc_sharpness or INITIAL_SHARPNESS


@torch.no_grad()
def token_embeddings(
    folder: Path, token_ids: list[int], dtype: torch.dtype, trust_remote_code: bool
) -> torch.Tensor:
    """Return the LLM's input embeddings of some tokens, [tokens, LLM width] in float32.

    Only the embeddings are read, unless transformers has to convert the LLM's files while it loads them.

    Args:
        folder: the LLM's folder.
        token_ids: the tokens.
        dtype: dtype of the LLM's weights in training, to which the embeddings are rounded.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ModelError: the LLM cannot be loaded.
    """
    try:
        llm, lazy_weights = describe_lazy_llm(folder, dtype, trust_remote_code)
    except NotLazilyLoadable:
        llm, lazy_weights = load_llm(folder, dtype, trust_remote_code=trust_remote_code), []
    layer = llm.get_input_embeddings()
    # A lazily described LLM has no values yet. For Vicuna 7B in bf16, this loop reads 0.26 GB of its 13.5 GB.
    for weight in lazy_weights:
        if any(module is layer for module, _ in weight.places):
            weight.put(weight.read_into(torch.empty(weight.parameter.shape, dtype=dtype)))
    # Call the layer instead of indexing its weight: some LLMs (Gemma) scale embeddings in this layer.
    return layer(torch.tensor(token_ids)).float().clone()
