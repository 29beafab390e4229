"""Greedy and beam search that make the same choices as transformers, with less computation.

Hypotheses are extended, finished and dropped by the same scores as in `GenerationMixin._beam_search`
(transformers 5 with `early_stopping=False`). Three things are computed differently:

- Audio and prompt run through the LLM once per utterance, not once per beam, in groups of similar length.
- The beams of an utterance share the keys and values of audio and prompt (`beam_cache.py`).
- An utterance leaves the batch as soon as it is settled, so one runaway answer does not hold up the others.
  It is settled when transformers would stop, or earlier, as soon as no continuation can become one of the
  requested answers.

For each utterance, the search also reports whether rounding may have decided a choice.
"""

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import cast

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import DynamicLayer

from slam_asr.generation.beam_cache import (
    CannotShare,
    SharedLayer,
    expand_for_beams,
    is_plain,
    shared_prefix_attention,
)

NEARLY_TIED = 1e-4
"""Difference in log probability below which rounding may decide between two hypotheses."""
_NEVER = -1.0e9
"""Score of a hypothesis that must not be chosen. transformers uses the same number."""
_WORTH_SHRINKING = 8
"""The batch shrinks only when at least one in this many of its utterances is settled, because shrinking
copies the cache of all others."""
_PREFILL_POSITIONS = 4096
"""Maximum number of positions of audio and prompt in one forward pass. It is large enough to occupy a GPU,
and small enough that the utterances of a group have similar lengths."""


@dataclass
class Answers:
    """The answers to a batch."""

    ids: torch.Tensor
    """[utterances, answers per utterance, tokens] int64: token ids, best answer first, padded at the end."""
    scores: torch.Tensor
    """[utterances, answers per utterance] float32: log probability after penalties, divided by
    tokens ** length penalty."""
    nearly_tied: list[bool] | None
    """For each utterance, whether any decision was between two hypotheses whose scores differed by less than
    `NEARLY_TIED`. None if not known."""


@dataclass
class _SearchState:
    """The utterances that are still searched, with their running beams and their finished answers."""

    utterances: torch.Tensor
    """[utterances]: indices in the batch."""
    ids: torch.Tensor
    """[utterances, beams, max_new_tokens]: tokens of the running beams."""
    scores: torch.Tensor
    """[utterances, beams]: log probability of the running beams, best first."""
    finished_ids: torch.Tensor
    """[utterances, beams, max_new_tokens]: tokens of the best finished answers, best first."""
    finished_scores: torch.Tensor
    """[utterances, beams]: same as `Answers.scores`; `_NEVER` where no answer is finished yet."""
    finished_lengths: torch.Tensor
    """[utterances, beams]: tokens of each finished answer, including the one that ends it."""
    is_finished: torch.Tensor
    """[utterances, beams] bool: whether there is a finished answer at this place of `finished_ids`."""
    improvable: torch.Tensor
    """[utterances] bool: whether a running beam may still improve on the finished answers; False means
    settled."""
    nearly_tied: torch.Tensor
    """[utterances] bool: same as `Answers.nearly_tied`."""

    def select(self, rows: torch.Tensor) -> "_SearchState":
        """Return the state of the utterances at `rows` [n] only."""
        return _SearchState(**{name: tensor[rows] for name, tensor in vars(self).items()})


def beam_search(
    llm: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor, generation: GenerationConfig
) -> Answers | None:
    """Decode a batch by beam search, or by greedy search if there is one beam.

    Args:
        llm: any causal LM.
        embeddings: [utterances, positions, LLM width], audio and prompt in the LLM's dtype, padded on the
            left.
        mask: [utterances, positions] int64, 0 on padding and else 1.
        generation: number of beams and answers, penalties, max_new_tokens, and the tokens that end and pad an
            answer.

    Returns:
        The answers; None if the LLM's cache does not consist of keys and values per position, as in Mamba.
    """
    # An LLM may accept a registered attention and still ask it for something that `attend` does not compute.
    # This is noticed at the first generated token, so starting over costs little.
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
) -> Answers | None:
    """Search with or without a prefix that the beams share; see `beam_search`.

    Raises:
        CannotShare: `share` is true, but the LLM's attention cannot share a prefix.
    """
    utterances, width = embeddings.shape[:2]
    beams, max_new_tokens = generation.num_beams, generation.max_new_tokens
    device = embeddings.device
    lengths = mask.sum(1)
    logits, cache = _prefill(llm, embeddings, mask)
    if type(cache) is not DynamicCache:
        return None
    share = share and is_plain(cache)
    cache = expand_for_beams(cache, beams, max_new_tokens, mask if share else None)
    logits = logits.repeat_interleave(beams, 0)
    mask = torch.cat([mask, mask.new_ones(utterances, max_new_tokens)], 1).repeat_interleave(beams, 0)
    stops = torch.tensor(generation.eos_token_id, device=device)
    processors = penalties(generation)
    fill_token = generation.pad_token_id or generation.eos_token_id[0]
    state = _start(utterances, beams, max_new_tokens, fill_token, device)
    # Collects the finished answers of all utterances, including those that have left `state`.
    result = _start(utterances, beams, max_new_tokens, fill_token, device)
    with shared_prefix_attention(llm) if share else contextlib.nullcontext():
        for step in range(max_new_tokens):
            is_last = step + 1 == max_new_tokens
            generated = cast(torch.LongTensor, state.ids[:, :, :step].flatten(0, 1))
            # As in transformers: greedy search penalises logits, beam search penalises log probabilities.
            log_probabilities = (
                processors(generated, logits.log_softmax(-1))
                if beams > 1
                else processors(generated, logits).log_softmax(-1)
            )
            state, continued_rows = _choose(
                state, log_probabilities.unflatten(0, (-1, beams)), step, stops, generation
            )
            settled = ~state.improvable if not is_last else torch.ones_like(state.improvable)
            newly_settled = state.utterances[settled]
            for name in ("finished_ids", "finished_scores", "finished_lengths", "nearly_tied"):
                getattr(result, name)[newly_settled] = getattr(state, name)[settled]
            if bool(settled.all()):
                break
            # Reorder before shrinking: `continued_rows` counts the rows of all utterances in the cache.
            cache.reorder_cache(cast(torch.LongTensor, continued_rows))
            if int(settled.sum()) * _WORTH_SHRINKING >= len(settled):
                remaining = (~settled).nonzero()[:, 0]
                rows = (remaining[:, None] * beams + torch.arange(beams, device=device)).flatten()
                cache.batch_select_indices(rows)
                state, mask, lengths = state.select(remaining), mask[rows], lengths[remaining]
            logits, _ = _forward(
                llm,
                # Position ids start at 0 with each utterance, so padding on the left is not counted.
                (lengths + step).repeat_interleave(beams)[:, None],
                mask[:, : width + step + 1],
                input_ids=state.ids[:, :, step].reshape(-1, 1),
                past_key_values=cache,
            )
            # An LLM that ignored the registered attention would have seen the generated tokens without the
            # prefix.
            if share and any(cast(SharedLayer, layer).attend_calls != step + 1 for layer in cache.layers):
                raise CannotShare
    answers = generation.num_return_sequences
    longest = int(result.finished_lengths[:, :answers].max())
    nearly_tied = result.nearly_tied
    # Rounding may also decide which of two finished answers is the best one.
    if beams > 1:
        nearly_tied |= (result.finished_scores[:, 0] - result.finished_scores[:, 1]) < NEARLY_TIED
    return Answers(
        result.finished_ids[:, :answers, :longest], result.finished_scores[:, :answers], nearly_tied.tolist()
    )


def _forward(
    llm: PreTrainedModel,
    positions: torch.Tensor,
    mask: torch.Tensor,
    inputs_embeds: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    past_key_values: DynamicCache | None = None,
) -> tuple[torch.Tensor, object]:
    """Run the LLM.

    Args:
        llm: any causal LM.
        positions: [rows, new positions] int64, position ids; used if the LLM accepts them.
        mask: [rows, all positions] int64, 0 on padding and else 1.
        inputs_embeds: [rows, new positions, LLM width], for the prefill.
        input_ids: [rows, new positions] int64, for each generated token.
        past_key_values: the cache; None for the prefill.

    Returns:
        Logits [rows, vocabulary] of the last position in fp32, and the cache.
    """
    # Not every family accepts `position_ids` and `logits_to_keep`.
    accepted = inspect.signature(llm.forward).parameters
    optional: dict[str, object] = {"position_ids": positions, "logits_to_keep": 1}
    inputs = {"inputs_embeds": inputs_embeds, "input_ids": input_ids, "past_key_values": past_key_values}
    output = llm(
        attention_mask=mask,
        use_cache=True,
        **{name: value for name, value in inputs.items() if value is not None},
        **{name: value for name, value in optional.items() if name in accepted},
    )
    return output.logits[:, -1].float(), getattr(output, "past_key_values", None)


def _prefill(
    llm: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, object]:
    """Run audio and prompt through the LLM.

    A large batch is divided into groups of similar length, longest first. Each group is padded only to its
    own longest utterance. The groups' keys and values are then gathered in one cache, aligned on the right.

    Args:
        llm: any causal LM.
        embeddings: [utterances, positions, LLM width], padded on the left.
        mask: [utterances, positions] int64, 0 on padding and else 1.

    Returns:
        Logits [utterances, vocabulary] of the first generated token, and the cache of all utterances.
    """

    def run_group(rows: torch.Tensor | slice, longest: int) -> tuple[torch.Tensor, object]:
        group_mask = mask[rows, width - longest :]
        return _forward(
            llm,
            (group_mask.cumsum(1) - 1).clamp(min=0),
            group_mask,
            inputs_embeds=embeddings[rows, width - longest :],
        )

    utterances, width = mask.shape
    if utterances * width <= _PREFILL_POSITIONS:
        return run_group(slice(None), width)
    lengths, order = mask.sum(1).sort(descending=True)
    logits: list[torch.Tensor] = []
    all_layers: list[DynamicLayer] = []
    complete: DynamicCache | None = None
    start = 0
    while start < utterances:
        longest = int(lengths[start])
        rows = order[start : start + max(1, _PREFILL_POSITIONS // longest)]
        group_logits, cache = run_group(rows, longest)
        if not is_plain(cache):
            # Layers with sliding windows cannot be gathered by position, so the batch runs in one pass.
            return run_group(slice(None), width)
        group = cast(DynamicCache, cache)
        layers = cast(list[DynamicLayer], group.layers)
        if complete is None:
            # The first group's cache object becomes that of all utterances.
            complete, all_layers = group, layers
        for all_rows, layer in zip(all_layers, layers, strict=True):
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None, "the forward pass has filled the cache"
            if start == 0:
                # Zeros, because masked positions still enter products: a NaN there would reach the output.
                all_rows.keys, all_rows.values = (
                    t.new_zeros(utterances, t.shape[1], width, t.shape[3]) for t in (keys, values)
                )
            assert all_rows.keys is not None and all_rows.values is not None, "allocated by the first group"
            all_rows.keys[rows, :, width - longest :] = keys
            all_rows.values[rows, :, width - longest :] = values
        logits.append(group_logits)
        start += len(rows)
    # Logits were collected in the groups' order; `argsort` inverts it. The cache was filled by row index.
    return torch.cat(logits)[order.argsort()], complete


def penalties(generation: GenerationConfig) -> LogitsProcessorList:
    """Build the processors that penalise tokens that an answer already contains.

    transformers' `generate` must not apply the repetition penalty itself. Given embeddings, it would not
    penalise as many of an answer's first tokens as there is padding to the left of the utterance. An answer
    would therefore depend on the other utterances of the batch.
    """
    penalty = generation.repetition_penalty
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])


def without_penalties(generation: GenerationConfig, scores: bool = False) -> GenerationConfig:
    """Copy a configuration for transformers' `generate`, which receives the `penalties` separately.

    Args:
        generation: same configuration as for `beam_search`.
        scores: whether `generate` returns the answers' scores along with their ids.
    """
    generation = copy.copy(generation)
    generation.repetition_penalty = 1.0
    generation.return_dict_in_generate = True
    generation.output_scores = scores
    return generation


def _start(
    utterances: int, beams: int, max_new_tokens: int, fill_token: int, device: torch.device
) -> _SearchState:
    """Return the state before the first token."""
    ids = torch.full((utterances, beams, max_new_tokens), fill_token, device=device)
    scores = torch.zeros(utterances, beams, device=device)
    # All beams are equal before the first token. Only one of them may be continued, or else all beams would
    # continue in the same way.
    scores[:, 1:] = _NEVER
    nothing_finished = torch.zeros(utterances, beams, dtype=torch.bool, device=device)
    return _SearchState(
        utterances=torch.arange(utterances, device=device),
        ids=ids,
        scores=scores,
        finished_ids=ids.clone(),
        finished_scores=torch.full_like(scores, _NEVER),
        finished_lengths=torch.zeros_like(nothing_finished, dtype=torch.long),
        is_finished=nothing_finished,
        improvable=torch.ones_like(nothing_finished[:, 0]),
        nearly_tied=torch.zeros_like(nothing_finished[:, 0]),
    )


def _choose(
    state: _SearchState,
    log_probabilities: torch.Tensor,
    step: int,
    stops: torch.Tensor,
    generation: GenerationConfig,
) -> tuple[_SearchState, torch.Tensor]:
    """Extend each utterance's beams by their best next tokens.

    Args:
        state: the state before the token. The finished answers of settled utterances no longer change.
        log_probabilities: [utterances, beams, vocabulary] float32, of the next token, after penalties.
        step: number of tokens generated so far.
        stops: [stops] int64, ids of the tokens that end an answer.
        generation: max_new_tokens, number of requested answers, and length penalty.

    Returns:
        The state after the token; and for each beam the row that it continues, [utterances · beams] int64.
    """
    max_new_tokens, length_penalty = generation.max_new_tokens, generation.length_penalty
    is_last = step + 1 == max_new_tokens
    utterances, beams, vocabulary = log_probabilities.shape
    # `beams` hypotheses must continue. Each beam can end in as many ways as there are stop tokens, so at most
    # stops · beams candidates end. Among (1 + stops) · beams candidates, at least `beams` therefore do not.
    candidates = max(2, 1 + len(stops)) * beams
    scores, indices = (log_probabilities + state.scores[:, :, None]).flatten(1).topk(candidates)
    beam, token = indices // vocabulary, indices % vocabulary
    ids = _gather_rows(state.ids, beam)
    ids[:, :, step] = token
    ends = torch.isin(token, stops) | is_last

    # The best candidates that do not end become the running beams. One more candidate is selected, but only
    # to detect near ties.
    running_scores = scores + ends * _NEVER
    best, order = running_scores.topk(beams + 1)
    # Two choices can be close: which candidates are among the `beams` best of all, and so may end an answer;
    # and which ones continue.
    nearly_tied = state.nearly_tied | _is_near(scores[:, beams - 1], scores[:, beams])
    if beams > 1:
        nearly_tied |= _is_near(best[:, beams - 1], best[:, beams])
    order = order[:, :beams]
    running_scores = running_scores.gather(1, order)

    # As in transformers, a candidate becomes a finished answer only if it is among the `beams` best of all.
    among_best = torch.arange(candidates, device=scores.device) < beams
    ending = ends & among_best
    ending_scores = scores / (step + 1) ** length_penalty
    ending_scores = ending_scores + (~state.improvable[:, None]) * _NEVER + (~ending) * _NEVER
    finished_scores, places = torch.cat([state.finished_scores, ending_scores], 1).topk(beams)
    is_finished = torch.cat([state.is_finished, ending], 1).gather(1, places)
    lengths = torch.cat([state.finished_lengths, torch.full_like(indices, step + 1)], 1).gather(1, places)

    # The first stop rule is that of transformers with early_stopping=False: stop when the best running beam,
    # scored as if it ended here, is no better than the worst finished answer. A place without an answer
    # counts as `_NEVER`.
    score_now = running_scores[:, :1] / (step + 1) ** length_penalty
    worst_finished = torch.where(is_finished, finished_scores.min(1, keepdim=True).values, _NEVER)
    improvable = state.improvable & (score_now > worst_finished).any(1)
    # The second stop rule is ours: stop when no continuation can become one of the requested answers. A sum S
    # of log probabilities is at most 0 and never rises, so a hypothesis that ends with n tokens in total
    # scores at most S / n**length_penalty. For a positive penalty, this bound grows with n and is highest at
    # max_new_tokens. Otherwise it is highest at the smallest n, which is one token more than now. The margin
    # allows for rounding errors in the scores.
    longest_or_next = max_new_tokens if length_penalty > 0 else step + 2
    bound = running_scores[:, 0] / longest_or_next**length_penalty
    improvable &= bound > finished_scores[:, generation.num_return_sequences - 1] - NEARLY_TIED
    if beams == 1:
        # Greedy search stops at the first end.
        improvable &= ~is_finished[:, 0]
    # Utterances that were settled before this token ignore it, so it cannot cause a near tie in them.
    nearly_tied = torch.where(state.improvable, nearly_tied, state.nearly_tied)
    # A beam's number within its utterance, converted to the row in the cache.
    rows = beam.gather(1, order) + torch.arange(utterances, device=beam.device)[:, None] * beams
    extended = _SearchState(
        utterances=state.utterances,
        ids=_gather_rows(ids, order),
        scores=running_scores,
        finished_ids=_gather_rows(torch.cat([state.finished_ids, ids], 1), places),
        finished_scores=finished_scores,
        finished_lengths=lengths,
        is_finished=is_finished,
        improvable=improvable,
        nearly_tied=nearly_tied,
    )
    return extended, rows.flatten()


def _gather_rows(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Select hypotheses: ids [utterances, any, tokens], places [utterances, n] → [utterances, n, tokens]."""
    return ids.gather(1, places[:, :, None].expand(-1, -1, ids.shape[-1]))


def _is_near(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Return for which utterances two scores [utterances] are nearly tied.

    A hypothesis with a score near `_NEVER` must not be chosen, so it cannot tie with another one.
    """
    return ((better - worse) < NEARLY_TIED) & (worse > _NEVER / 2)
