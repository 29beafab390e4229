"""Greedy and beam search that make the same choices as transformers, with less computation.

Hypotheses are extended, finished and dropped by the same scores as in `GenerationMixin._beam_search`
(transformers 5 with `early_stopping=False`). Three things are computed differently:

- Audio and prompt run through the LLM once per utterance, not once per beam, in groups of similar length.
- The beams of an utterance share the keys and values of audio and prompt (`beam_cache.py`).
- Settled utterances leave the batch, so that one runaway answer costs little. An utterance is settled when
  transformers would stop, or earlier, as soon as no continuation can become one of the requested answers.

For each utterance, the search also reports whether rounding may have decided a choice.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import RepetitionPenaltyLogitsProcessor

from slam_asr.generation import beam_cache
from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling
from slam_asr.generation.prefill import forward, prefill
from slam_asr.generation.search_state import NEARLY_TIED, SearchState, choose

_WORTH_SHRINKING = 8
"""If this is n, the batch shrinks only when at least 1/n of its utterances are settled, because shrinking
copies the cache of all others."""


@dataclass
class Answers:
    """The answers to a batch."""

    ids: torch.Tensor
    """[utterances, answers per utterance, tokens] int64: token ids, best answer first, padded at the end."""
    scores: torch.Tensor
    """[utterances, answers per utterance] float32: log probability after penalties, including CTC's share and
    divided by tokens ** length_penalty."""
    nearly_tied: list[bool] | None
    """For each utterance, whether any decision was between two hypotheses whose scores differed by less than
    `NEARLY_TIED`. None if not known."""


def beam_search(
    llm: PreTrainedModel,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    generation: GenerationConfig,
    spelling: CtcSpelling | None = None,
    ctc_weight: float = 0.0,
) -> Answers | None:
    """Decode a batch by beam search, or by greedy search if there is one beam.

    Args:
        llm: any causal LM.
        embeddings: [utterances, positions, LLM width], audio and prompt in the LLM's dtype, padded on the
            left.
        mask: [utterances, positions] int64, 0 on padding and else 1.
        generation: number of beams and answers, penalties, max_new_tokens, and the tokens that end and pad an
            answer.
        spelling: CTC's log probabilities; None for a search without CTC.
        ctc_weight: CTC's share of the scores, from 0 to 1.

    Returns:
        The answers; None if the LLM's cache is not a `DynamicCache`, as in Mamba.
    """
    arguments = (llm, embeddings, mask, generation, spelling, ctc_weight)
    # An LLM may use `beam_cache.attend` as its attention, but need something that `attend` does not compute.
    # The search notices it at the first generated token, so starting over costs little.
    if getattr(llm, "_supports_attention_backend", False):
        with contextlib.suppress(beam_cache.CannotShare):
            return _search(*arguments, share=True)
    return _search(*arguments, share=False)


def _search(
    llm: PreTrainedModel,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    generation: GenerationConfig,
    spelling: CtcSpelling | None,
    ctc_weight: float,
    share: bool,
) -> Answers | None:
    """Search with or without a prefix that the beams share; see `beam_search`.

    Raises:
        CannotShare: `share` is true, but the LLM's attention cannot share a prefix.
    """
    utterances, width = mask.shape
    beams, max_new_tokens = generation.num_beams, generation.max_new_tokens
    device, lengths = embeddings.device, mask.sum(1)
    logits, cache = prefill(llm, embeddings, mask)
    if type(cache) is not DynamicCache:
        return None
    share = share and beam_cache.is_plain(cache)
    cache = beam_cache.expand_for_beams(cache, beams, max_new_tokens, mask if share else None)
    logits = logits.repeat_interleave(beams, 0)
    # The mask gets columns for all tokens to come. Each step uses the columns up to its own token.
    mask = torch.cat([mask, mask.new_ones(utterances, max_new_tokens)], 1).repeat_interleave(beams, 0)
    stops = torch.tensor(generation.eos_token_id, device=device)
    scorer = None if spelling is None else CtcScorer(spelling, ctc_weight, beams, stops)
    processors = penalties(generation)
    state = SearchState.start(utterances, generation, device)
    # Collects the finished answers of all utterances, including those that have left `state`.
    result = SearchState.start(utterances, generation, device)
    with beam_cache.shared_prefix_attention(llm) if share else contextlib.nullcontext():
        for step in range(max_new_tokens):
            scores = _scores(logits, state, step, processors, scorer)
            state, continued_rows = choose(state, scores, step, stops, generation)
            settled = ~state.improvable | (step + 1 == max_new_tokens)
            # Settled utterances may stay in the batch until it shrinks. Their answers no longer change, so
            # collecting them again does no harm.
            result.collect(state, settled)
            if bool(settled.all()):
                break
            # Reorder before shrinking: `continued_rows` are row numbers of the cache before it shrinks.
            cache.reorder_cache(cast(torch.LongTensor, continued_rows))
            if int(settled.sum()) * _WORTH_SHRINKING >= len(settled):
                remaining = (~settled).nonzero()[:, 0]
                rows = (remaining[:, None] * beams + torch.arange(beams, device=device)).flatten()
                cache.batch_select_indices(rows)
                state, mask, lengths = state.select(remaining), mask[rows], lengths[remaining]
                continued_rows = continued_rows[rows]
            tokens = state.ids[:, :, step].reshape(-1, 1)
            if scorer:
                scorer.advance(continued_rows, tokens[:, 0])
            # Position ids start at 0 with each utterance, so padding on the left is not counted.
            positions = (lengths + step).repeat_interleave(beams)[:, None]
            step_mask = mask[:, : width + step + 1]
            logits, _ = forward(llm, positions, step_mask, input_ids=tokens, past_key_values=cache)
            # An LLM may ignore the registered attention. Its tokens have then not attended to the prefix.
            if share and any(cast(Any, layer).attend_calls != step + 1 for layer in cache.layers):
                raise beam_cache.CannotShare
    return _answers(result, generation)


def _scores(
    logits: torch.Tensor,
    state: SearchState,
    step: int,
    processors: LogitsProcessorList,
    scorer: CtcScorer | None,
) -> torch.Tensor:
    """Return the next token's scores [utterances, beams, vocabulary]: log probabilities with CTC's share.

    The logits are [utterances · beams, vocabulary]. As in transformers, greedy search penalises logits, and
    beam search penalises log probabilities.
    """
    beams = state.ids.shape[1]
    generated = cast(torch.LongTensor, state.ids[:, :, :step].flatten(0, 1))
    if beams == 1:
        log_probabilities = processors(generated, cast(torch.FloatTensor, logits)).log_softmax(-1)
    else:
        log_probabilities = processors(generated, cast(torch.FloatTensor, logits.log_softmax(-1)))
    log_probabilities = log_probabilities.unflatten(0, (-1, beams))
    return scorer.add(log_probabilities) if scorer else log_probabilities


def _answers(result: SearchState, generation: GenerationConfig) -> Answers:
    """Return the requested number of the best finished answers."""
    # Every utterance has as many finished answers as were requested: none is settled before it has them, and
    # at the last token all candidates end.
    answers, nearly_tied = generation.num_return_sequences, result.nearly_tied
    longest = int(result.finished_lengths[:, :answers].max())
    # Rounding may also decide which of two finished answers is the best one.
    if generation.num_beams > 1:
        nearly_tied |= (result.finished_scores[:, 0] - result.finished_scores[:, 1]) < NEARLY_TIED
    return Answers(
        result.finished_ids[:, :answers, :longest], result.finished_scores[:, :answers], nearly_tied.tolist()
    )


def penalties(generation: GenerationConfig) -> LogitsProcessorList:
    """Build the processors that penalise tokens that an answer already contains.

    transformers' `generate` must not apply the repetition penalty itself. Given embeddings, it would exempt
    an answer's first n tokens from the penalty, where n is the number of the utterance's padding positions.
    An answer would therefore depend on the other utterances of the batch.
    """
    # https://github.com/huggingface/transformers/pull/45389 has only added a warning: `generate` of
    # transformers 5.23 still exempts these tokens from the penalty.
    penalty = generation.repetition_penalty
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])


def without_penalties(generation: GenerationConfig) -> GenerationConfig:
    """Copy a configuration for transformers' `generate`, which receives the `penalties` separately.

    Args:
        generation: same configuration as for `beam_search`. After a beam search, `generate` returns the
            answers' scores along with their ids.
    """
    # A copy, because the caller uses its own configuration, with its penalty, again for the next batch.
    generation = copy.copy(generation)
    generation.repetition_penalty = 1.0
    generation.return_dict_in_generate = True
    generation.output_scores = generation.num_beams > 1
    return generation
