"""Adds CTC's scores to the LLM's in transformers' `generate`. This file needs only torch and transformers.

A logits processor gets tokens and scores, but not the order in which `generate` continues beams. It does
not need it: CTC's state of a hypothesis depends only on its utterance and its tokens. So a row may continue
the state of any row of the previous step that belongs to the same utterance and had the same tokens.
"""

import math
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from .configuration_slam_asr import SlamAsrConfig
from .ctc_prefix_slam_asr import CtcScorer, CtcSpelling

_HIGHEST_WEIGHT = 0.9
"""The limit of the recipe's `decoding.ctc_weight`. With a share of 1, the LLM would have no say."""


def require_ctc_weight(weight: float, config: SlamAsrConfig) -> float:
    """Return CTC's share of the scores.

    Raises:
        ValueError: the share is out of range, or the model has no CTC head.
    """
    if not 0 <= weight <= _HIGHEST_WEIGHT:
        raise ValueError(f"ctc_weight is {weight}: give a number from 0 to {_HIGHEST_WEIGHT}.")
    if weight and not config.ctc_tokens:
        raise ValueError(f"ctc_weight is {weight}, but this model has no CTC head: leave it out.")
    return weight


def ctc_logits(outputs: torch.Tensor, config: SlamAsrConfig, embedding: Any) -> torch.Tensor:
    """Return CTC's logits [positions, 1 + tokens] in fp32; column 0 is the blank's.

    They are negative squared distances from the tokens' embeddings, halved and scaled, up to a constant per
    position that softmax ignores.

    Args:
        outputs: [positions, LLM width], the projector's.
        config: has the head: the tokens and the factor of the logits.
        embedding: the LLM's embedding layer. It is called, because some LLMs scale embeddings inside it.
    """
    tokens = embedding(torch.tensor(config.ctc_tokens, device=embedding.weight.device)).float()
    tokens = tokens.to(outputs.device)
    size, sharpness = tokens.norm(dim=1).mean(), config.ctc_sharpness
    tokens = tokens / size
    return (outputs.float() * (sharpness / size)) @ tokens.T - tokens.square().sum(1) / 2 * sharpness


def without_blanks(
    mask: torch.Tensor | None, is_audio: torch.Tensor, logits: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Return an attention mask [rows, positions] that is also 0 at blanks.

    Args:
        mask: [rows, positions], 0 on padding; None without padding.
        is_audio: [rows, positions] bool.
        logits: [positions of all audio, 1 + tokens], from `ctc_logits`.
        threshold: a blank is a position at which CTC gives the blank at least this probability.
    """
    are_blanks = logits[:, 0] - logits.logsumexp(1) >= math.log(threshold)
    mask = torch.ones_like(is_audio, dtype=torch.long) if mask is None else mask.clone()
    mask[is_audio.to(mask.device)] = (~are_blanks).to(mask)
    return mask


class CtcPrefixProcessor(LogitsProcessor):
    """Adds CTC's scores of a batch's audio to the LLM's in one call of `generate`.

    Args:
        logits: [positions of all utterances, 1 + tokens], from `ctc_logits`. Positions that the LLM does not
            read (`drop_blanks`) are among them.
        positions: number of positions of each utterance.
        config: has the tokens of the head.
        weight: CTC's share of the scores; the LLM has the rest.
        generation: has the number of beams and the tokens that end an answer.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        positions: list[int],
        config: SlamAsrConfig,
        weight: float,
        generation: GenerationConfig,
    ) -> None:
        self.logits, self.positions, self.config, self.weight = logits, positions, config, weight
        self.are_logits = (generation.num_beams or 1) == 1
        """Whether `generate` gives logits. In beam search it gives log probabilities, with penalties."""
        stops: Any = generation.eos_token_id
        self.stops = [] if stops is None else torch.as_tensor(stops).flatten().tolist()
        self._scorer: CtcScorer | None = None
        self._ids: torch.Tensor | None = None
        """[rows, tokens]: the hypotheses that `_scorer` has reached."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the weighted scores of the next token.

        Args:
            input_ids: [rows, tokens], the hypotheses without the prompt, which `generate` gets as embeddings.
                The rows of an utterance are adjacent.
            scores: [rows, vocabulary], of the LLM.
        """
        continued = self._continued(input_ids)
        if self._scorer is None or continued is None:
            self._scorer = self._start(input_ids, scores)
        else:
            self._scorer.advance(continued, input_ids[:, -1])
        self._ids = input_ids.clone()
        log_probabilities = scores.log_softmax(-1) if self.are_logits else scores
        return self._scorer.add(log_probabilities[:, None])[:, 0]

    def _continued(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Return the row of the previous step that each row continues, [rows] int64.

        Returns:
            None if the rows do not continue those of the previous step by one token each.
        """
        if self._ids is None or ids.shape != (self._ids.shape[0], self._ids.shape[1] + 1):
            return None
        beams = len(ids) // len(self.positions)
        now, before = (x.unflatten(0, (-1, beams)) for x in (ids[:, :-1], self._ids))
        same = (now[:, :, None] == before[:, None]).all(-1)  # [utterances, beams, beams of the previous step]
        if not bool(same.any(-1).all()):
            return None
        first_rows = torch.arange(0, len(ids), beams, device=ids.device)[:, None]
        return (same.int().argmax(-1) + first_rows).flatten()

    def _start(self, ids: torch.Tensor, scores: torch.Tensor) -> CtcScorer:
        """Return a scorer that has reached the hypotheses. `generate` usually starts with empty ones."""
        spelling = CtcSpelling.of(
            self.logits.to(scores.device), self.positions, *self._columns(scores.shape[1], scores.device)
        )
        stops = torch.tensor(self.stops, dtype=torch.long, device=scores.device)
        scorer = CtcScorer(spelling, self.weight, len(ids) // len(self.positions), stops)
        rows = torch.arange(len(ids), device=scores.device)
        for tokens in ids.T:
            scorer.advance(rows, tokens)
        return scorer

    def _columns(self, vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `columns` and `first_columns` of `CtcSpelling`."""
        within = torch.full((vocabulary,), -1, device=device)
        tokens = torch.tensor(self.config.ctc_tokens, device=device)
        # Column 0 is the blank's, which is no token of a text.
        within[tokens[1:]] = torch.arange(1, len(tokens), device=device)
        first = within.clone()
        tokens = torch.tensor(self.config.ctc_first_tokens, dtype=torch.long, device=device)
        known = ((tokens >= 0) & (tokens < vocabulary)).nonzero()[:, 0]
        first[tokens[known]] = known
        return within, first
