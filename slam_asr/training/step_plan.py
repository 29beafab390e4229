"""Plans which utterances make up each optimiser step, and which process computes which of them.

The recipe fixes the number of LLM positions per optimiser step. The order and the grouping of utterances
depend only on the seed and the epoch. Only the division of a step among processes depends on the number of
processes, so the same seed gives the same steps on any number of GPUs. This does not hold with
`training.utterances_per_batch`, because then the size of a step depends on the number of processes. In each
step, all processes get the same number of micro-batches, so that none waits for another that has more.

An epoch is planned in three levels:

- *Windows.* The shards of the feature store are shuffled and taken a few at a time. The utterances of these
  few shards are shuffled together. A reader then needs only the shards of the current window and the next
  one, and fetches each shard once per epoch.
- *Pools.* The shuffled utterances of a window are cut into pools of about `STEPS_PER_POOL` steps, and each
  pool is sorted by length. The utterances of a step then have similar lengths and need little padding.
- *Steps.* Each sorted pool is cut into steps. The steps of a window are shuffled, so that short and long
  utterances still come in random order.
"""

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slam_asr.config.recipe import Training
from slam_asr.models.grouping import cut_at_budget, padded_batches
from slam_asr.training.batches import Examples

STEPS_PER_POOL = 16
"""Number of steps whose utterances are sorted by length together.

A larger number means less padding, but also less mixing of the utterances.
"""


@dataclass
class Window:
    """A few shards, and the optimiser steps over their utterances."""

    epoch: int
    shards: list[int]
    """Canonical numbers of the shards: their ranks by smallest audio id, as in `Examples.shards`."""
    steps: list[list[int]]
    """Indices of each step's utterances."""


def plan_epoch(
    positions: Sequence[int],
    shards: np.ndarray,
    window_shards: int,
    budget: int,
    seed: int,
    epoch: int,
    sizes: Sequence[int] | None = None,
) -> Iterator[Window]:
    """Group utterances into the optimiser steps of one epoch.

    Args:
        positions: [utterances] number of LLM positions of each utterance.
        shards: [utterances] integers: canonical number of the shard that contains each utterance's features;
            see `Window.shards`.
        window_shards: number of shards whose utterances are shuffled together.
        budget: maximum size of a step, in LLM positions or in the unit of `sizes`. A single utterance that is
            larger gets a step of its own.
        seed: seed of the order.
        epoch: number of the epoch. Each epoch has its own order.
        sizes: [utterances] share of the budget that each utterance takes; by default, its positions.

    Yields:
        Windows; every shard is in exactly one, and every index occurs exactly once.
    """
    # `Random` hashes a text seed with SHA-512, so the order is the same on every machine and in every version
    # of Python.
    generator = random.Random(f"{seed}/{epoch}")
    sizes = positions if sizes is None else sizes
    # Cutting after each shard's last utterance leaves an empty piece at the end.
    by_shard = np.split(np.argsort(shards, kind="stable"), np.cumsum(np.bincount(shards)))[:-1]
    order = list(range(len(by_shard)))
    generator.shuffle(order)
    for begin in range(0, len(order), window_shards):
        window = order[begin : begin + window_shards]
        shuffled = [i for s in window for i in by_shard[s].tolist()]
        generator.shuffle(shuffled)
        steps: list[list[int]] = []
        for pool in cut_at_budget(shuffled, sizes, STEPS_PER_POOL * budget):
            # The index breaks ties, so the result does not depend on the order before sorting.
            pool.sort(key=lambda i: (positions[i], i))
            steps += cut_at_budget(pool, sizes, budget)
        generator.shuffle(steps)
        yield Window(epoch, window, steps)


@dataclass(frozen=True)
class Budget:
    """The maximum sizes of an optimiser step and of a micro-batch."""

    step: int
    batch: int
    counts_utterances: bool = False
    """Whether both sizes are in utterances, as in the reference implementation, instead of LLM positions."""

    def sizes(self, positions: Sequence[int]) -> Sequence[int]:
        """Return the share of the budget that each utterance takes, [utterances].

        Args:
            positions: [utterances] number of LLM positions of each utterance.
        """
        return [1] * len(positions) if self.counts_utterances else positions


def budget_for(options: Training, processes: int) -> Budget:
    """Return the recipe's budget for a number of processes."""
    utterances = options.utterances_per_batch
    if utterances:
        return Budget(utterances * options.accumulation * processes, utterances, counts_utterances=True)
    return Budget(options.positions_per_step, options.positions_per_batch)


class TrainingPlan:
    """All optimiser steps of a training run.

    Steps are not held in memory: each iteration plans the epochs again, with the same result.

    Args:
        examples: the utterances to train on.
        budget: the size of a step.
        window_shards: number of shards whose utterances are shuffled together.
        seed: seed of the order.
        epochs: number of passes over the examples after the beginning.
        max_steps: maximum number of steps after the beginning. Training then ends, even within an epoch.
        beginning: number of steps of the beginning. The beginning has as many epochs of its own as it needs;
            the rest of its last epoch is skipped.
    """

    def __init__(
        self,
        examples: Examples,
        budget: Budget,
        window_shards: int,
        seed: int,
        epochs: int,
        max_steps: int,
        beginning: int = 0,
    ) -> None:
        self.examples, self.max_steps = examples, max_steps
        sizes = budget.sizes(examples.positions)
        self._plan = lambda epoch: plan_epoch(
            examples.positions, examples.shards, window_shards, budget.step, seed, epoch, sizes
        )
        self._epochs = epochs
        self.set_beginning(beginning)

    def set_beginning(self, beginning: int) -> None:
        """Set the number of steps of the beginning, and count the plan's steps and epochs again."""
        self.beginning = beginning
        """Number of steps of the beginning."""
        self._beginning_epochs = planned = 0
        while planned < beginning:
            planned += self._steps_of(self._beginning_epochs)
            self._beginning_epochs += 1
        steps = epochs = 0
        while epochs < self._epochs and steps < self.max_steps:
            # Epoch numbers continue after those of the beginning, so no order of utterances occurs twice.
            steps = min(self.max_steps, steps + self._steps_of(self._beginning_epochs + epochs))
            epochs += 1
        self.steps = beginning + steps
        """Number of steps, including those of the beginning."""
        self.epochs = self._beginning_epochs + epochs
        """Number of epochs begun, including those of the beginning."""

    def _steps_of(self, epoch: int) -> int:
        return sum(len(window.steps) for window in self._plan(epoch))

    def after(self, done: int) -> Iterator[tuple[Window, Window | None, list[int]]]:
        """Yield (window, next window or None, indices of the utterances) for each step after `done` steps."""
        # The next window comes along, so that a reader can fetch its shards while those of the current one
        # are used.
        pairs = itertools.pairwise(itertools.chain(self._windows(), [None]))
        steps = (
            (window, next_window, step)
            for window, next_window in pairs
            if window is not None  # always true: only the last `next_window` is None
            for step in window.steps
        )
        return itertools.islice(steps, done, self.steps)

    def _windows(self) -> Iterator[Window]:
        remaining = self.beginning
        for epoch in range(self._beginning_epochs):
            for window in self._plan(epoch):
                # Windows after the last step are not yielded, because a reader would fetch their shards for
                # nothing.
                if remaining:
                    yield replace(window, steps=window.steps[:remaining])
                remaining = max(0, remaining - len(window.steps))
        for epoch in range(self._epochs):
            yield from self._plan(self._beginning_epochs + epoch)


def split_step(
    step: list[int], positions: Sequence[int], processes: int, budget: int, sizes: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their padded micro-batches.

    Utterances are taken from the longest to the shortest, and each micro-batch is filled up before the next
    one begins, so that utterances of similar length share a micro-batch and need little padding. Then the
    micro-batches with the most utterances are halved, until their number is a multiple of `processes`.

    Args:
        step: indices of the step's utterances.
        positions: [utterances] number of LLM positions of each utterance.
        processes: number of processes that share the step.
        budget: maximum size of a micro-batch, in LLM positions including padding or in the unit of `sizes`. A
            single utterance that is larger gets a micro-batch of its own.
        sizes: [utterances] share of the budget that each utterance takes; by default, its positions.

    Returns:
        [process][micro-batch] → indices. All processes have the same number of micro-batches. Some of these
        may be empty, for example if the step has fewer utterances than processes.
    """
    sizes = positions if sizes is None else sizes
    groups = padded_batches(sizes, budget, sorted(step, key=lambda i: (-positions[i], i)))
    # Each pass adds one group: it halves the largest group or, if no group has two utterances, adds an empty
    # one.
    while len(groups) % processes:
        largest = max(range(len(groups)), key=lambda g: (len(groups[g]), -g), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
        else:
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    # Neighbouring groups have utterances of similar lengths. Different processes compute them at the same
    # time, so no process waits long for another.
    return [groups[rank::processes] for rank in range(processes)]


def split_packed(
    step: list[int], positions: Sequence[int], processes: int, budget: int
) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their packed micro-batches.

    Packed micro-batches have no padding, so lengths may be mixed freely. Utterances are dealt out longest
    first, each to the emptiest micro-batch. All micro-batches are then about equally full, and no process
    waits long for another. The fullest micro-batch is at most 4/3 as full as in the best possible division
    (Graham, 1969). The number of micro-batches starts at the smallest multiple of `processes` that the sum of
    positions allows, and grows until all of them are within the budget.

    Args:
        step: indices of the step's utterances.
        positions: [utterances] number of LLM positions of each utterance.
        processes: number of processes that share the step.
        budget: maximum number of LLM positions of a micro-batch. A single utterance that is longer gets a
            micro-batch of its own.

    Returns:
        [process][micro-batch] → indices, as from `split_step`.
    """
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    rounds = max(1, -(-sum(positions[i] for i in step) // (budget * processes)))
    # The loop ends at the latest when it has as many groups as utterances: an empty group always gets the
    # next utterance, so each group then has at most one.
    while True:
        groups: list[list[int]] = [[] for _ in range(rounds * processes)]
        # A heap with (number of positions, number of the group) for each group.
        fill = [(0, number) for number in range(len(groups))]
        for index in longest_first:
            size, number = heapq.heappop(fill)
            groups[number].append(index)
            heapq.heappush(fill, (size + positions[index], number))
        if all(size <= budget or len(groups[number]) == 1 for size, number in fill):
            break
        rounds += 1
    # Empty groups are last, so all processes have work in every round of micro-batches except the last ones.
    groups.sort(key=lambda group: not group)
    return [groups[rank::processes] for rank in range(processes)]
