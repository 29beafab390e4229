"""Scores of hypotheses by CTC, for a search that adds them to the LLM's.

An LLM that recognises badly writes fluent sentences that nobody said, or repeats itself. CTC's score makes
both rarer, because it depends on the content of the audio and on its order. The probability that a transcript
begins with a prefix is the sum over all paths that spell the prefix first, whatever follows. Watanabe et al.
(2017, "Hybrid CTC/attention architecture for end-to-end speech recognition", algorithm 2) compute it token by
token. For a prefix g and the first t positions,

    n(g, t): probability of the paths that spell g and end with its last token,
    b(g, t): probability of the paths that spell g and end with a blank,

and for the token c after g,

    φ(t) = b(g, t) + n(g, t), or b(g, t) alone if c repeats g's last token,
    n(gc, t) = (n(gc, t-1) + φ(t-1)) · p(c at t),
    b(gc, t) = (b(gc, t-1) + n(gc, t-1)) · p(blank at t),
    ψ(gc) = Σ φ(t-1) · p(c at t), the probability of all transcripts that begin with gc.

Both recursions are linear, so their solutions are sums: with C(t) = Σ log p(c at s) over s ≤ t,
log n(gc, t) = C(t) + logcumsumexp(log φ(t-1) - C(t-1)). This needs no loop over positions. C falls to several
thousand below zero, so these sums are computed in float64.
"""

from dataclasses import dataclass

import torch

_NEVER = -1.0e9
"""Log probability of impossible events. -inf would become NaN in differences."""
_FLOOR = -20.0
"""Lowest log probability of a token at a position. Tokens that CTC does not know have it at every position,
so they are unlikely, but not impossible."""
_LOWEST_GAIN = -1.0e5
"""Lowest score of a token. Tokens are impossible if the audio has too few positions for them. If all
candidates are, the LLM must still choose between them. In float32, a score of -1e9 would hide the LLM's."""
CANDIDATES = 20
"""Number of tokens that may continue a hypothesis: the LLM's most probable ones. CTC scores only these."""


@dataclass
class CtcSpelling:
    """CTC's log probabilities of a batch's audio, and their columns for the LLM's tokens."""

    log_probabilities: torch.Tensor
    """[utterances, positions, 1 + tokens] float32; column 0 is the blank's. Beyond an utterance's end, the
    blank has probability 1."""
    columns: torch.Tensor
    """[vocabulary] int64: the column of each of the LLM's tokens; -1 for tokens that CTC does not know."""
    first_columns: torch.Tensor
    """[vocabulary] int64: the same for the first token of an answer. It differs only if `llm.answer_prefix`
    does not end with a space, so that this token has no space before it."""

    @classmethod
    def of(
        cls, logits: torch.Tensor, positions: list[int], columns: torch.Tensor, first_columns: torch.Tensor
    ) -> "CtcSpelling":
        """Normalise and pad logits.

        Args:
            logits: [positions of all utterances, 1 + tokens], as from `CtcHead`.
            positions: number of positions of each utterance.
            columns: [vocabulary] int64, as in the class.
            first_columns: [vocabulary] int64, as in the class.
        """
        # With no position at all, a first token would have the log probability -inf.
        shape = (len(positions), max(1, *positions), logits.shape[1])
        padded = torch.full(shape, _FLOOR, device=logits.device)
        padded[:, :, 0] = 0.0
        for row, part in zip(padded, logits.float().log_softmax(1).split(positions), strict=True):
            row[: len(part)] = part.clamp(min=_FLOOR)
        return cls(padded, columns, first_columns)


class CtcScorer:
    """Adds CTC's scores to the LLM's while a search runs.

    A row is a beam of an utterance, as in the search's cache.

    Args:
        spelling: CTC's log probabilities of the audio.
        weight: CTC's share of the score, from 0 to 1. The LLM's share is the rest.
        beams: number of beams per utterance.
        stops: [stops] int64, ids of the tokens that end an answer.
    """

    def __init__(self, spelling: CtcSpelling, weight: float, beams: int, stops: torch.Tensor) -> None:
        self.spelling, self.weight, self.stops = spelling, weight, stops
        utterances = torch.arange(len(spelling.log_probabilities), device=stops.device)
        self._utterances = utterances.repeat_interleave(beams)
        """[rows] int64: index of each row's utterance in `spelling`."""
        blanks = self._blanks()
        rows = len(blanks)
        # Only paths of blanks spell the empty prefix.
        self._b = torch.cat([blanks.new_zeros(rows, 1), blanks], 1)
        """[rows, positions + 1] float64: log b of each row's hypothesis. Column 0 is before all positions."""
        self._n = torch.full_like(self._b, _NEVER)
        """[rows, positions + 1] float64: log n."""
        self._prefix = blanks.new_zeros(rows)
        """[rows] float64: log ψ of each row's hypothesis."""
        self._last = torch.full((rows,), -2, device=stops.device)
        """[rows] int64: column of each hypothesis' last token. -2 before the first, and -1 for an unknown
        token, which `_before` never counts as a repetition."""
        self._columns = spelling.first_columns

    def add(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the LLM's and CTC's log probabilities of the next token.

        Args:
            log_probabilities: [utterances, beams, vocabulary] float32, the LLM's.

        Returns:
            Same shape and dtype. Tokens that are not among a row's `CANDIDATES` cannot be chosen.
        """
        rows = log_probabilities.flatten(0, 1)
        scores, tokens = rows.topk(min(CANDIDATES, rows.shape[1]))
        ends = torch.isin(tokens, self.stops)
        prefixes = self._prefix_scores(tokens)
        # For an answer that ends here, only the paths count that spell it and nothing more: they end with its
        # last token (n) or with a blank (b).
        complete = torch.logaddexp(self._n[:, -1], self._b[:, -1])
        prefixes = torch.where(ends, complete[:, None], prefixes)
        gains = (prefixes - self._prefix[:, None]).clamp(min=_LOWEST_GAIN).to(scores.dtype)
        sums = (1 - self.weight) * scores + self.weight * gains
        return torch.full_like(rows, _NEVER).scatter(1, tokens, sums).view_as(log_probabilities)

    def advance(self, continued: torch.Tensor, tokens: torch.Tensor) -> None:
        """Let each row continue the hypothesis of an earlier row by a token.

        Args:
            continued: [rows] int64, the earlier row that each row continues. Rows that nothing continues
                belonged to settled utterances or dropped hypotheses.
            tokens: [rows] int64, the tokens.
        """
        self._utterances, self._n, self._b, self._last = (
            tensor[continued] for tensor in (self._utterances, self._n, self._b, self._last)
        )
        self._prefix = self._prefix_scores(tokens[:, None])[:, 0]
        columns, phi = self._columns[tokens], self._before(tokens[:, None])[:, 0]
        token = self._of_tokens(tokens[:, None])[:, 0].cumsum(1)
        blank = self._blanks()
        start = token.new_zeros(len(token), 1)
        # These are the sums of the module's docstring. `token` and `blank` are C(t) for the token and for the
        # blank; with `start` before them, they are C(t-1).
        n = token + (phi[:, :-1] - torch.cat([start, token[:, :-1]], 1)).logcumsumexp(1)
        never = torch.full_like(start, _NEVER)
        self._n = torch.cat([never, n], 1)
        b = blank + (self._n[:, :-1] - torch.cat([start, blank[:, :-1]], 1)).logcumsumexp(1)
        self._b = torch.cat([never, b], 1)
        self._last = columns
        self._columns = self.spelling.columns

    def _blanks(self) -> torch.Tensor:
        """Return the sum of log p(blank) up to each position: [rows, positions] float64."""
        return self.spelling.log_probabilities[self._utterances, :, 0].double().cumsum(1)

    def _of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return log p of tokens [rows, candidates] at each position: [rows, candidates, positions]."""
        columns, p = self._columns[tokens], self.spelling.log_probabilities
        positions = torch.arange(p.shape[1], device=p.device)
        known = p[self._utterances[:, None, None], positions, columns.clamp(min=0)[:, :, None]].double()
        return torch.where((columns < 0)[:, :, None], _FLOOR, known)

    def _before(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return log φ of tokens [rows, candidates]: [rows, candidates, positions + 1]."""
        any_end = torch.logaddexp(self._n, self._b)[:, None]
        columns = self._columns[tokens]
        repeats = (columns == self._last[:, None]) & (columns >= 0)
        return torch.where(repeats[:, :, None], self._b[:, None], any_end)

    def _prefix_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return log ψ of each row's hypothesis continued by tokens [rows, candidates]: the same shape."""
        return (self._before(tokens)[:, :, :-1] + self._of_tokens(tokens)).logsumexp(2)
