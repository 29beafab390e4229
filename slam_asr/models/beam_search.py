"""Beam search and greedy search, with the choices of transformers' own and less of its work.

The same hypotheses are kept, finished and given up, by the same scores (`GenerationMixin._beam_search` of transformers 5 with
`early_stopping=False`). What differs is what is computed: audio and prompt are read once an utterance and not once a beam, among those of
like length; the beams share their keys and values; and an utterance whose answer is settled leaves the batch, so that one that talks without end holds up nobody.
Settled it is when transformers would stop, and before that when whatever may follow cannot reach what is asked for. And it is known of each utterance whether
rounding may have decided.
"""

import contextlib
import copy
import inspect
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from slam_asr.models.beam_cache import CannotShare, beams_share, for_beams, is_plain

CLOSE = 1e-4
"""Difference in log probability below which rounding may decide between two choices."""
_NEVER = -1.0e9
"""Score of what cannot be chosen."""
_WORTH_LEAVING = 8
"""Settled utterances leave when they are one in so many: the others' keys and values are copied then."""
_READ = 4096
"""Positions of audio and prompt that are read at once: enough to keep a machine busy, and few enough to leave padding out."""


@dataclass
class Found:
    """The answers to a batch."""

    ids: torch.Tensor
    """[utterances, answers to each, tokens], filled up behind the end; best answers first."""
    scores: torch.Tensor
    """[utterances, answers to each]: log probability, after penalties, per token to the power of the length penalty."""
    close: list[bool] | None
    """Of each utterance, whether somewhere a choice was made by less than `CLOSE`; None where that is not known."""


@dataclass
class _Beams:
    """Utterances that are still searched."""

    number: torch.Tensor
    """[utterances]: their places in the batch."""
    ids: torch.Tensor
    """[utterances, beams, tokens]"""
    scores: torch.Tensor
    """[utterances, beams]: log probability so far."""
    ended: torch.Tensor
    """As `ids`, of answers that have come to their end."""
    ended_scores: torch.Tensor
    ended_lengths: torch.Tensor
    has_ended: torch.Tensor
    """[utterances, beams] bool: whether there is such an answer in that place."""
    improvable: torch.Tensor
    """[utterances] bool: whether one that goes on may still become better than the worst that has ended."""
    close: torch.Tensor
    """[utterances] bool"""

    def only(self, chosen: torch.Tensor) -> "_Beams":
        return _Beams(**{name: tensor[chosen] for name, tensor in vars(self).items()})


def beam_search(
    llm: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor, generation: GenerationConfig
) -> Found | None:
    """Answer a batch; with one beam, greedily.

    Args:
        llm: any causal LM.
        embeddings: [utterances, positions, LLM width] of audio and prompt, padded on the left.
        mask: [utterances, positions], 0 where there is padding.
        generation: beams, answers to each, penalties, most tokens, tokens that end an answer, and the one that fills up.

    Returns:
        The answers, or None for an LLM whose cache is of another kind than keys and values of each position.
    """
    # LLMs whose attention is transformers' common one; that may still ask for something of its own, at the first token.
    if getattr(llm, "_supports_attention_backend", False):
        with contextlib.suppress(CannotShare):
            return _search(llm, embeddings, mask, generation, share=True)
    return _search(llm, embeddings, mask, generation, share=False)


def _search(
    llm: PreTrainedModel,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    generation: GenerationConfig,
    share: bool,
) -> Found | None:
    utterances, width = embeddings.shape[:2]
    beams, most = generation.num_beams, generation.max_new_tokens
    device = embeddings.device
    lengths = mask.sum(1)
    logits, cache = _read(llm, embeddings, mask)
    if type(cache) is not DynamicCache:
        return None
    share = share and is_plain(cache)
    cache = for_beams(cache, beams, most, mask if share else None)
    logits = logits.repeat_interleave(beams, 0)
    mask = torch.cat([mask, mask.new_ones(utterances, most)], 1).repeat_interleave(beams, 0)
    stops = torch.tensor(generation.eos_token_id, device=device)
    processors = penalties(generation)
    fill = generation.pad_token_id or generation.eos_token_id[0]
    at = _begin(utterances, beams, most, fill, device)
    result, all_close = (
        _begin(utterances, beams, most, fill, device),
        torch.zeros(utterances, dtype=torch.bool, device=device),
    )
    for step in range(most):
        last = step + 1 == most
        said = at.ids[:, :, :step].flatten(0, 1)
        # As in transformers: in greedy search a penalty changes logits, in beam search log probabilities.
        log_probabilities = (
            processors(said, logits.log_softmax(-1))
            if beams > 1
            else processors(said, logits).log_softmax(-1)
        )
        at, chosen = _choose(at, log_probabilities.unflatten(0, (-1, beams)), step, stops, generation)
        settled = ~at.improvable if not last else torch.ones_like(at.improvable)
        new = at.number[settled]
        for of in ("ended", "ended_scores", "ended_lengths"):
            getattr(result, of)[new] = getattr(at, of)[settled]
        all_close[new] = at.close[settled]
        if bool(settled.all()):
            break
        cache.reorder_cache(chosen)
        if int(settled.sum()) * _WORTH_LEAVING >= len(settled):
            stay = (~settled).nonzero()[:, 0]
            rows = (stay[:, None] * beams + torch.arange(beams, device=device)).flatten()
            cache.batch_select_indices(rows)
            at, mask, lengths = at.only(stay), mask[rows], lengths[stay]
        positions = (lengths + step).repeat_interleave(beams)[:, None]
        seen = mask[:, : width + step + 1]
        with beams_share(llm) if share else contextlib.nullcontext():
            logits, _ = _run(
                llm,
                positions,
                input_ids=at.ids[:, :, step].reshape(-1, 1),
                attention_mask=seen,
                past_key_values=cache,
            )
        if share and any(layer.attended != step + 1 for layer in cache.layers):
            raise CannotShare
    answers = generation.num_return_sequences
    longest = int(result.ended_lengths[:, :answers].max())
    close = (
        all_close
        if beams == 1
        else all_close | ((result.ended_scores[:, 0] - result.ended_scores[:, 1]) < CLOSE)
    )
    return Found(result.ended[:, :answers, :longest], result.ended_scores[:, :answers], close.tolist())


def _run(
    llm: PreTrainedModel, positions: torch.Tensor, **inputs: torch.Tensor
) -> tuple[torch.Tensor, object]:
    """Logits [rows, vocabulary] of the last position, and the cache."""
    takes = inspect.signature(llm.forward).parameters
    more = {"position_ids": positions} if "position_ids" in takes else {}
    more |= {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    output = llm(**inputs, **more, use_cache=True)
    return output.logits[:, -1].float(), getattr(output, "past_key_values", None)


def _read(llm: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, object]:
    """Read audio and prompt → logits [utterances, vocabulary] of the first token, and the cache."""

    def read(rows: torch.Tensor | slice, longest: int) -> tuple[torch.Tensor, object]:
        seen = mask[rows, width - longest :]
        return _run(
            llm,
            (seen.cumsum(1) - 1).clamp(min=0),
            inputs_embeds=embeddings[rows, width - longest :],
            attention_mask=seen,
        )

    utterances, width = mask.shape
    if utterances * width <= _READ:
        return read(slice(None), width)
    lengths, order = mask.sum(1).sort(descending=True)
    logits, whole, start = [], None, 0
    while start < utterances:
        longest = int(lengths[start])
        rows = order[start : start + max(1, _READ // longest)]
        found, cache = read(rows, longest)
        if not is_plain(cache):
            return read(slice(None), width)
        whole = cache if whole is None else whole
        for layer, part in zip(whole.layers, cache.layers, strict=True):
            keys, values = part.keys, part.values
            if start == 0:
                layer.keys, layer.values = (
                    t.new_zeros(utterances, t.shape[1], width, t.shape[3]) for t in (keys, values)
                )
            layer.keys[rows, :, width - longest :], layer.values[rows, :, width - longest :] = keys, values
        logits.append(found)
        start += len(rows)
    return torch.cat(logits)[order.argsort()], whole


def penalties(generation: GenerationConfig) -> LogitsProcessorList:
    """What is done to the scores of tokens that were said already.

    transformers' own `generate` leaves out as many of the first tokens of an answer as the utterance has padding before it, when it is
    given embeddings: then what is said would depend on what an utterance is batched with.
    """
    penalty = generation.repetition_penalty
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])


def without_penalties(generation: GenerationConfig, scores: bool = False) -> GenerationConfig:
    """The same for transformers, where `penalties` stand beside it; it gives more than the ids, with `scores` those of the answers too."""
    generation = copy.copy(generation)
    generation.repetition_penalty, generation.return_dict_in_generate, generation.output_scores = (
        1.0,
        True,
        scores,
    )
    return generation


def _begin(utterances: int, beams: int, most: int, fill: int, device: torch.device) -> _Beams:
    ids = torch.full((utterances, beams, most), fill, device=device)
    scores = torch.zeros(utterances, beams, device=device)
    scores[:, 1:] = _NEVER  # All beams are the same yet: the first one speaks for them.
    none = torch.zeros(utterances, beams, dtype=torch.bool, device=device)
    return _Beams(
        torch.arange(utterances, device=device),
        ids,
        scores,
        ids.clone(),
        torch.full_like(scores, _NEVER),
        torch.zeros_like(none, dtype=torch.long),
        none,
        torch.ones_like(none[:, 0]),
        torch.zeros_like(none[:, 0]),
    )


def _choose(
    at: _Beams, log_probabilities: torch.Tensor, step: int, stops: torch.Tensor, generation: GenerationConfig
) -> tuple[_Beams, torch.Tensor]:
    """Take the best continuations → the beams with their new tokens, and the row that each continues.

    Args:
        at: the beams so far; those that are settled stay as they are in what has ended.
        log_probabilities: [utterances, beams, vocabulary] of the next token.
        step: tokens so far.
        stops: tokens that end an answer.
        generation: most tokens, answers to each, and the power of the number of tokens that a score is divided by.
    """
    most, length_penalty = generation.max_new_tokens, generation.length_penalty
    last = step + 1 == most
    utterances, beams, vocabulary = log_probabilities.shape
    candidates = max(2, 1 + len(stops)) * beams
    # So many that enough of them go on, even if all of the best end here.
    scores, indices = (log_probabilities + at.scores[:, :, None]).flatten(1).topk(candidates)
    beam, token = indices // vocabulary, indices % vocabulary
    ids = _take(at.ids, beam)
    ids[:, :, step] = token
    ends = torch.isin(token, stops) | last

    going_on = scores + ends * _NEVER
    best, order = going_on.topk(beams + 1)
    close = at.close | _near(scores[:, beams - 1], scores[:, beams])
    if beams > 1:
        close |= _near(best[:, beams - 1], best[:, beams])
    order = order[:, :beams]

    among_best = torch.arange(candidates, device=scores.device) < beams
    ending = ends & among_best
    offered = scores / (step + 1) ** length_penalty + (~at.improvable[:, None]) * _NEVER + (~ending) * _NEVER
    ended_scores, places = torch.cat([at.ended_scores, offered], 1).topk(beams)
    has_ended = torch.cat([at.has_ended, ending], 1).gather(1, places)
    lengths = torch.cat([at.ended_lengths, torch.full_like(indices, step + 1)], 1).gather(1, places)

    running = going_on.gather(1, order)
    hoped = running[:, :1] / (step + 1) ** length_penalty
    worst = torch.where(has_ended, ended_scores.min(1, keepdim=True).values, _NEVER)
    improvable = at.improvable & (hoped > worst).any(1)
    # Log probabilities are never above zero, so a score only falls; per token it can rise until the last one, as far as tokens that cost nothing would take it.
    bound = running[:, 0] / (most if length_penalty > 0 else step + 2) ** length_penalty
    improvable &= bound > ended_scores[:, generation.num_return_sequences - 1] - CLOSE
    if beams == 1:
        # Greedy search is over at the first end.
        improvable &= ~has_ended[:, 0]
    # Of what is settled nothing changes any more, so nothing is close.
    close = torch.where(at.improvable, close, at.close)
    rows = beam.gather(1, order) + torch.arange(utterances, device=beam.device)[:, None] * beams
    now = _Beams(
        at.number,
        _take(ids, order),
        running,
        _take(torch.cat([at.ended, ids], 1), places),
        ended_scores,
        lengths,
        has_ended,
        improvable,
        close,
    )
    return now, rows.flatten()


def _take(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[utterances, places, tokens] of [utterances, anything, tokens]."""
    return ids.gather(1, places[:, :, None].expand(-1, -1, ids.shape[-1]))


def _near(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    return ((better - worse) < CLOSE) & (worse > _NEVER / 2)
