"""Yields the micro-batches of one process, and sums their scores over a step."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from slam_asr.models.answer_loss import AnswerScores, score_answers
from slam_asr.models.batch import Batch
from slam_asr.models.ctc import CtcBatch
from slam_asr.training.batches import BatchReader
from slam_asr.training.builder import Parts
from slam_asr.training.step_plan import split_packed, split_step


@dataclass
class MicroBatch:
    """The utterances that one process passes through the model at once."""

    number: int
    """Number of the optimiser step that it belongs to, from 1."""
    epoch: int
    """Number of the epoch, from 0."""
    step: list[int]
    """Indices of all utterances of the step, including those of other processes."""
    batch: Batch | CtcBatch
    targets: int
    """Number of target tokens of the step, over all processes."""
    is_last: bool
    """Whether this is the last micro-batch of its step on this process."""
    filled: int
    """Number of LLM positions without padding."""


@dataclass
class Totals:
    """Sums over the micro-batches of a step.

    `add` sums the first three fields over this process. `Loop._reduce` sets the others, from the sums over
    all processes.
    """

    scores: torch.Tensor | None = None
    """[3] float64 on the device: loss, correct tokens and target tokens of this process.

    The values stay on the device, because reading them would make the CPU wait for the GPU.
    """
    filled: int = 0
    """Number of LLM positions of this process, without padding."""
    cells: int = 0
    """Number of LLM positions of this process, with padding."""
    loss: float = math.nan
    """Mean loss per target token."""
    accuracy: float = math.nan
    """Share of the target tokens to which the model gives the highest probability. In the beginning, 1 minus
    the token error rate of CTC's best paths."""
    positions: int = 0
    """Number of LLM positions without padding."""
    padding: float = math.nan
    """Share of the LLM positions that is padding."""
    stop: bool = False
    """Whether any process was asked to stop."""
    pending: float = 0.0
    """Number of checkpoints that are being written or queued, as a mean over the processes."""
    failed: bool = False
    """Whether a checkpoint could not be written, so that training must stop."""
    due: bool = False
    """Whether `training.checkpoint_minutes` have passed since the last checkpoint."""

    def add(self, scores: torch.Tensor, micro: MicroBatch) -> None:
        """Add a micro-batch.

        Args:
            scores: [3] float64, as in `AnswerScores.sums`.
            micro: the micro-batch.
        """
        self.scores = scores if self.scores is None else self.scores + scores
        self.filled += micro.filled
        self.cells += micro.batch.cells


def remaining_micro_batches(parts: Parts, done: int) -> Iterator[MicroBatch]:
    """Yield this process's micro-batches of the remaining steps of the current phase.

    Args:
        parts: the parts of the training run.
        done: number of steps already done, including those of an earlier phase.
    """
    reader = parts.readers["train"]
    current = None
    steps = itertools.islice(parts.plan.after(done), parts.last_step - done)
    for number, (window, next_window, step) in enumerate(steps, start=done + 1):
        if window is not current:
            reader.expect([*window.shards, *(next_window.shards if next_window else [])])
            current = window
        mine = own_share(parts, step, reader)
        # The targets of the complete step are counted, not only those of `mine`: the engine needs the total
        # to scale this process's loss (see `engines/engine.py`), and counting needs no communication.
        targets = reader.count_targets(step, window.epoch)
        for i, indices in enumerate(mine, start=1):
            batch = reader.batch(indices, window.epoch)
            if isinstance(batch, CtcBatch):
                batch.distance_weight = parts.distance_weight(number)
            # Without indices, the batch is one utterance without targets, all of whose positions count as
            # padding.
            yield MicroBatch(
                number=number,
                epoch=window.epoch,
                step=step,
                batch=batch,
                targets=targets,
                is_last=i == len(mine),
                filled=batch.filled if indices else 0,
            )


def own_share(parts: Parts, step: list[int], reader: BatchReader) -> list[list[int]]:
    """Return the indices of this process's share of a step, one list per micro-batch."""
    positions, budget = reader.examples.positions, parts.budget
    if reader.packs and not budget.counts_utterances:
        return split_packed(step, positions, parts.processes, budget.batch)[parts.rank]
    return split_step(step, positions, parts.processes, budget.batch, budget.sizes(positions))[parts.rank]


def scores_of(output: torch.Tensor | tuple[torch.Tensor, ...], batch: Batch | CtcBatch) -> AnswerScores:
    """Score a micro-batch's target tokens.

    Args:
        output: the model's output: logits [targets, vocabulary], or the fields of `AnswerScores` from a model
            that computes the loss itself.
        batch: the micro-batch.
    """
    if isinstance(output, tuple):
        return AnswerScores(*output)
    assert isinstance(batch, Batch), "a CtcModel returns scores"
    return score_answers(output, batch.labels)
