"""The micro-batches of one process: its share of each step, read ahead of the model; and their sums."""

import itertools
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
    """Number of its optimiser step, from 1."""
    epoch: int
    step: list[int]
    """Indices of the step's utterances, on all processes."""
    batch: Batch | CtcBatch
    targets: int
    """Target tokens of the step, on all processes."""
    is_last: bool
    """Whether this is the last micro-batch of its step on this process."""
    filled: int
    """LLM positions without padding."""
    cells: int
    """LLM positions with padding."""


@dataclass
class Totals:
    """Sums over a step: first this process's own, then, after `Loop._reduce`, those of all processes."""

    scores: torch.Tensor | None = None
    """[3] float64 on the device: loss, correct tokens and target tokens of this process.

    They remain a tensor on the device, because reading the values would make the CPU wait for the GPU.
    """
    filled: int = 0
    """LLM positions of this process, without padding."""
    cells: int = 0
    """LLM positions of this process, with padding."""
    numbers: tuple[float, ...] = (0.0,) * 5
    """Loss, correct tokens, target tokens, filled positions and positions with padding, of all processes."""
    stop: bool = False
    """Whether any process was asked to stop."""
    pending: float = 0.0
    """Number of checkpoints that are still being written: the mean over the processes."""
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
        self.cells += micro.cells

    @property
    def loss(self) -> float:
        """Mean over the target tokens."""
        return self.numbers[0] / self.numbers[2]

    @property
    def accuracy(self) -> float:
        """Share of the target tokens to which the model gives the highest probability."""
        return self.numbers[1] / self.numbers[2]

    @property
    def positions(self) -> int:
        """LLM positions without padding."""
        return int(self.numbers[3])

    @property
    def padding(self) -> float:
        """Share of the LLM positions that is padding."""
        return 1 - self.numbers[3] / self.numbers[4]


def remaining_micro_batches(parts: Parts, done: int) -> Iterator[MicroBatch]:
    """Yield this process's micro-batches of the current phase's steps after the first `done` ones."""
    reader = parts.readers["train"]
    current = None
    steps = itertools.islice(parts.plan.after(done), parts.last_step - done)
    for number, (window, next_window, step) in enumerate(steps, start=done + 1):
        if window is not current:
            reader.expect([*window.shards, *(next_window.shards if next_window else [])])
            current = window
        mine = own_share(parts, step, reader)
        # Of the complete step, not only of `mine`: each process can count them without communication, and the
        # engine needs the total to scale this process's loss (see `engines/engine.py`).
        targets = reader.count_targets(step, window.epoch)
        for i, indices in enumerate(mine, start=1):
            batch = reader.batch(indices, window.epoch)
            if isinstance(batch, CtcBatch):
                batch.distance_weight = parts.distance_weight(number)
            # Without indices, the batch is one utterance without targets. In the share of padding, it counts
            # as padding.
            yield MicroBatch(
                number=number,
                epoch=window.epoch,
                step=step,
                batch=batch,
                targets=targets,
                is_last=i == len(mine),
                filled=batch.filled if indices else 0,
                cells=batch.cells,
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
        output: what the model returns: the fields of `AnswerScores` if it has a scorer, or else logits
            [targets, vocabulary].
        batch: the micro-batch.
    """
    if isinstance(output, tuple):
        return AnswerScores(*output)
    assert isinstance(batch, Batch), "a CtcModel returns scores"
    return score_answers(output, batch.labels)
