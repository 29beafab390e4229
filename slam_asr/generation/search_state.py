"""The hypotheses of a beam search, and how each token extends, finishes and drops them.

The rules are those of `GenerationMixin._beam_search` (transformers 5 with `early_stopping=False`), with one
more stop rule.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import GenerationConfig

NEARLY_TIED = 1e-4
"""Difference in log probability below which rounding may decide between two hypotheses."""
_NEVER = -1.0e9
"""Score of a hypothesis that must not be chosen. transformers uses the same number."""


@dataclass
class SearchState:
    """Utterances of a batch, with their running beams and their finished answers."""

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
    """[utterances, beams]: tokens of each finished answer, including the one that ends it; 0 where no answer
    is finished yet."""
    improvable: torch.Tensor
    """[utterances] bool: whether a running beam may still improve on the finished answers; False means
    settled."""
    nearly_tied: torch.Tensor
    """[utterances] bool: same as `Answers.nearly_tied`."""

    @classmethod
    def start(cls, utterances: int, generation: GenerationConfig, device: torch.device) -> "SearchState":
        """Return the state before the first token."""
        beams, pad = generation.num_beams, generation.pad_token_id
        fill_token = generation.eos_token_id[0] if pad is None else pad
        ids = torch.full((utterances, beams, generation.max_new_tokens), fill_token, device=device)
        scores = torch.zeros(utterances, beams, device=device)
        # All beams are equal before the first token. Only one of them may be continued, or else all beams
        # would continue in the same way.
        scores[:, 1:] = _NEVER
        return cls(
            utterances=torch.arange(utterances, device=device),
            ids=ids,
            scores=scores,
            finished_ids=ids.clone(),
            finished_scores=torch.full_like(scores, _NEVER),
            finished_lengths=torch.zeros_like(scores, dtype=torch.long),
            improvable=torch.ones(utterances, dtype=torch.bool, device=device),
            nearly_tied=torch.zeros(utterances, dtype=torch.bool, device=device),
        )

    def select(self, rows: torch.Tensor) -> "SearchState":
        """Return the state of the utterances at `rows` [n] only."""
        return SearchState(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def collect(self, state: "SearchState", settled: torch.Tensor) -> None:
        """Take over the finished answers of the utterances that `settled` [utterances] marks in `state`."""
        rows = state.utterances[settled]
        for name in ("finished_ids", "finished_scores", "finished_lengths", "nearly_tied"):
            getattr(self, name)[rows] = getattr(state, name)[settled]


class _Candidates(NamedTuple):
    """Each utterance's best one-token extensions of its beams, best first."""

    ids: torch.Tensor
    """[utterances, candidates, max_new_tokens]: tokens."""
    scores: torch.Tensor
    """[utterances, candidates]: log probability."""
    beams: torch.Tensor
    """[utterances, candidates]: number of the extended beam within its utterance."""
    ends: torch.Tensor
    """[utterances, candidates] bool: whether the new token ends the answer."""


def choose(
    state: SearchState,
    log_probabilities: torch.Tensor,
    step: int,
    stops: torch.Tensor,
    generation: GenerationConfig,
) -> tuple[SearchState, torch.Tensor]:
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
    utterances, beams = state.scores.shape
    candidates = _best_candidates(state, log_probabilities, step, stops)
    scores = candidates.scores
    # The best candidates that do not end become the running beams. One more candidate is selected, but only
    # to detect near ties.
    best, order = (scores + candidates.ends * _NEVER).topk(beams + 1)  # at least 2 · beams candidates exist
    # Two decisions can be close. The first is which candidates are among the `beams` best: only these may
    # become finished answers. The second is which candidates continue.
    nearly_tied = _is_near(scores[:, beams - 1], scores[:, beams])
    if beams > 1:
        nearly_tied |= _is_near(best[:, beams - 1], best[:, beams])
    order = order[:, :beams]
    # A beam's row in the cache is its number within the utterance, plus the utterance's first row.
    first_rows = torch.arange(utterances, device=scores.device)[:, None] * beams
    extended = replace(
        _finish(state, candidates, step, generation),
        ids=_gather_rows(candidates.ids, order),
        scores=best[:, :beams],
        # Utterances that were settled before this token ignore it, so it cannot cause a near tie in them.
        nearly_tied=state.nearly_tied | (nearly_tied & state.improvable),
    )
    extended.improvable = state.improvable & _is_improvable(extended, step, generation)
    return extended, (candidates.beams.gather(1, order) + first_rows).flatten()


def _best_candidates(
    state: SearchState, log_probabilities: torch.Tensor, step: int, stops: torch.Tensor
) -> _Candidates:
    """Select each utterance's candidates; the arguments are those of `choose`."""
    _, beams, vocabulary = log_probabilities.shape
    # `beams` hypotheses must continue. Each beam can end in as many ways as there are stop tokens, so at most
    # stops · beams candidates end. Among (1 + stops) · beams candidates, at least `beams` therefore do not.
    count = max(2, 1 + len(stops)) * beams
    # One selection over beams and tokens together: index = beam · vocabulary + token.
    scores, indices = (log_probabilities + state.scores[:, :, None]).flatten(1).topk(count)
    beam, token = indices // vocabulary, indices % vocabulary
    ids = _gather_rows(state.ids, beam)
    ids[:, :, step] = token
    is_last = step + 1 == ids.shape[2]
    return _Candidates(ids, scores, beam, torch.isin(token, stops) | is_last)


def _finish(
    state: SearchState, candidates: _Candidates, step: int, generation: GenerationConfig
) -> SearchState:
    """Return the state with the best finished answers, those that end now included."""
    beams = state.scores.shape[1]
    # As in transformers, a candidate becomes a finished answer only if it is among the `beams` best of all.
    among_best = torch.arange(candidates.ends.shape[1], device=candidates.ends.device) < beams
    ending = candidates.ends & among_best & state.improvable[:, None]
    ending_scores = candidates.scores / (step + 1) ** generation.length_penalty + ~ending * _NEVER
    # Finished answers and those that end now compete for the same `beams` places.
    scores, places = torch.cat([state.finished_scores, ending_scores], 1).topk(beams)
    lengths = torch.cat([state.finished_lengths, ending * (step + 1)], 1).gather(1, places)
    ids = _gather_rows(torch.cat([state.finished_ids, candidates.ids], 1), places)
    return replace(state, finished_ids=ids, finished_scores=scores, finished_lengths=lengths)


def _is_improvable(state: SearchState, step: int, generation: GenerationConfig) -> torch.Tensor:
    """Return [utterances] bool: whether a running beam may still improve on the finished answers."""
    length_penalty, is_finished = generation.length_penalty, state.finished_lengths > 0
    best_running = state.scores[:, :1]
    # The first stop rule is that of transformers with early_stopping=False: stop when the best running beam,
    # scored as if it ended here, is no better than the worst finished answer. A place without an answer
    # counts as `_NEVER`.
    score_now = best_running / (step + 1) ** length_penalty
    worst_finished = torch.where(is_finished, state.finished_scores.min(1, keepdim=True).values, _NEVER)
    improvable = (score_now > worst_finished).any(1)
    # The second stop rule is ours: stop when no continuation can become one of the requested answers. A sum S
    # of log probabilities is at most 0 and never rises, so a hypothesis that ends with n tokens in total
    # scores at most S / n**length_penalty. For a positive penalty, this bound grows with n and is highest at
    # max_new_tokens. Otherwise it is highest at the smallest n, which is one token more than now. The margin
    # allows for rounding errors in the scores.
    longest_or_next = generation.max_new_tokens if length_penalty > 0 else step + 2
    bound = best_running[:, 0] / longest_or_next**length_penalty
    improvable &= bound > state.finished_scores[:, generation.num_return_sequences - 1] - NEARLY_TIED
    if state.scores.shape[1] == 1:
        # Greedy search stops at the first end.
        improvable &= ~is_finished[:, 0]
    return improvable


def _gather_rows(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Select hypotheses: ids [utterances, any, tokens], places [utterances, n] → [utterances, n, tokens]."""
    return ids.gather(1, places[:, :, None].expand(-1, -1, ids.shape[-1]))


def _is_near(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Return [utterances] bool: whether two scores [utterances] are nearly tied.

    A hypothesis with a score near `_NEVER` must not be chosen, so it cannot tie with another one.
    """
    return ((better - worse) < NEARLY_TIED) & (worse > _NEVER / 2)
