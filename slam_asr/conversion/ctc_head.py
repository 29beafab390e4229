"""The CTC head of a model, as the configuration of a folder for transformers records it."""

from typing import Any

from slam_asr.artifacts.model_folder import CTC_HEAD
from slam_asr.conversion.parts import Parts
from slam_asr.errors import ModelError
from slam_asr.models.ctc_vocabulary import CtcVocabulary
from slam_asr.models.llm import load_tokenizer
from slam_asr.pretrained.locate import locate_model
from slam_asr.progress import log_line


def ctc_weight_of(parts: Parts) -> float:
    """Return CTC's share of the scores in the folder's decoding: the recipe's, or 0 without a CTC head."""
    return parts.recipe.decoding.ctc_weight if CTC_HEAD in parts.content.facts else 0.0


def ctc_options(parts: Parts) -> dict[str, Any]:
    """Return the arguments of `SlamAsrConfig` that describe CTC: all `ctc_…`, and `drop_blanks`.

    Raises:
        ModelError: the LLM expects no blanks, but the model has no CTC head to find them.
    """
    recipe, head = parts.recipe, parts.content.facts.get(CTC_HEAD)
    threshold = recipe.projector.drop_blanks
    if head is None:
        if threshold:
            raise ModelError(
                f"{parts.where} has no CTC head, which projector.drop_blanks ({threshold}) needs: convert "
                "the checkpoint of the finished training run, or set projector.drop_blanks to 0 if it was "
                "trained without."
            )
        if recipe.decoding.ctc_weight:
            log_line(
                f"{parts.where} has no CTC head, so decoding.ctc_weight ({recipe.decoding.ctc_weight}) is "
                "left out: the folder decodes with the LLM alone"
            )
        return {}
    return {
        "drop_blanks": threshold,
        "ctc_tokens": head["tokens"],
        "ctc_sharpness": head["sharpness"],
        "ctc_first_tokens": _first_tokens(parts, head["tokens"]),
        "ctc_weight": ctc_weight_of(parts),
    }


def _first_tokens(parts: Parts, tokens: list[int]) -> list[int]:
    """Return the token that stands for each of CTC's tokens at the beginning of an answer.

    `CtcVocabulary.columns` has the reason. The folder's code has no tokenizer, so it needs the result.

    Returns:
        For each of `tokens`, the id of the same token without a space before it; -1 if none exists. Empty if
        answers begin with a space.
    """
    if parts.recipe.llm.answer_prefix.endswith(" "):
        return []
    tokenizer = load_tokenizer(locate_model(parts.recipe.llm.name))
    within, first = CtcVocabulary(tokenizer, tokens).columns(max(len(tokenizer), *(t + 1 for t in tokens)))
    found = [-1] * len(tokens)
    for token in (first != within).nonzero()[:, 0].tolist():
        found[int(first[token])] = token
    return found
