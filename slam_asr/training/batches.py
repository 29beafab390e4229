"""Plans which utterances make up each optimiser step, and which process computes which of them.

The recipe fixes the number of LLM positions per optimiser step. The order and the grouping of utterances
depend only on the seed and the epoch. Only the division of a step among processes depends on the number of
processes, so the same seed gives the same steps on any number of GPUs. (With `training.utterances_per_batch`
this does not hold: a step then has a number of utterances per process.) In each step all processes get the
same number of micro-batches, so that none waits for another that has more of them.

An epoch is planned in three levels:

- *Windows.* The shards of the feature store are shuffled and taken a few at a time. The utterances of these
  few are shuffled together. A reader then needs only the shards of the current window and the next one, and
  fetches each shard once per epoch.
- *Pools.* The shuffled utterances of a window are cut into pools of about `STEPS_PER_POOL` steps, and each
  pool is sorted by length: if the utterances of a step have similar lengths, they need little padding.
- *Steps.* Each sorted pool is cut into steps, and the steps of a window are shuffled, so that lengths still
  come in random order.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from slam_asr.artifacts.feature_store.index import argsort_audio_ids
from slam_asr.artifacts.feature_store.reader import FeatureReader
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import samples_of
from slam_asr.config.recipe import Projector, Training
from slam_asr.errors import InputError
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt, TokenizedPrompt
from slam_asr.models.slam import IGNORED, Batch, Row, collate, pack

STEPS_PER_POOL = 16
"""Number of steps whose utterances are sorted by length together.

More steps reduce the padding, but mix the utterances less.
"""


@dataclass
class PromptedTarget:
    """An utterance's text together with one of the prompts, as token ids."""

    before: list[int]
    """Token ids in front of the audio."""
    prompt: list[int]
    """Token ids between the audio and the answer."""
    answer: list[int]
    """The targets: token ids of the transcript and of the token that ends it."""

    @property
    def positions(self) -> int:
        """LLM positions of all text."""
        return len(self.before) + len(self.prompt) + len(self.answer)


class Examples:
    """Utterances as input of the LLM, without their audio.

    Holds a few numbers per utterance; texts are tokenised again when a batch needs them.

    Args:
        utterances: of a manifest.
        reader: gives the length and the shard of each utterance's audio.
        projector: determines how many LLM positions the audio takes.
        prompt: the recipe's prompts, tokenised.
        prompts: those of them that may be drawn for an utterance.
        limit: maximum number of LLM positions, or None if the LLM has no limit.

    Raises:
        InputError: an utterance has no features, or does not fit the LLM.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        reader: FeatureReader,
        projector: Projector,
        prompt: Prompt,
        prompts: list[TokenizedPrompt],
        limit: int | None,
    ) -> None:
        self.utterances, self.prompt, self.prompts = utterances, prompt, prompts
        count = len(utterances)
        self.audio_positions = np.zeros(count, np.int32)
        """[utterances] int32: LLM positions of the audio."""
        self.targets = np.zeros((count, len(prompts)), np.int32)
        """[utterances, prompts] int32: number of target tokens."""
        self.positions: list[int] = []
        """[utterances] LLM positions of audio and text with the longest of `prompts`: a batch then fits,
        whichever prompt is drawn."""
        self.hours = 0.0
        audio_ids, samples = bytearray(), []
        for index, utterance in enumerate(utterances):
            audio_ids += bytes.fromhex(utterance.audio_id)
            samples.append(samples_of(utterance))
            prompted = [self._prompted(utterance, p) for p in prompts]
            self.audio_positions[index] = positions_of(projector, reader.span(utterance))
            self.targets[index] = [len(p.answer) for p in prompted]
            longest = max(prompted, key=lambda p: p.positions)
            self.positions.append(int(self.audio_positions[index]) + longest.positions)
            self.hours += (utterance.duration or 0.0) / 3600
            if limit is not None and self.positions[-1] > limit:
                raise InputError(
                    f"Utterance {utterance.key} needs {self.positions[-1]} LLM positions (audio "
                    f"{self.audio_positions[index]}, prompt {len(longest.before) + len(longest.prompt)}, "
                    f"answer {len(longest.answer)}) but the LLM holds {limit}: shorten it with "
                    "data.max_duration, or the prompt."
                )
        columns = np.frombuffer(bytes(audio_ids), np.uint8).reshape(-1, 32)
        self.shards, self.reader_shards = _in_canonical_order(
            reader.shards_of(columns, np.array(samples, np.int64)), columns
        )
        """`shards`: [utterances] int32, the canonical shard number of each utterance. `reader_shards`: the
        reader's number for each canonical one."""

    def __len__(self) -> int:
        return len(self.utterances)

    def prompted(self, index: int, prompt: int) -> PromptedTarget:
        """Tokenise an utterance's text with one of the prompts, both given by their index."""
        return self._prompted(self.utterances[index], self.prompts[prompt])

    def _prompted(self, utterance: Utterance, prompt: TokenizedPrompt) -> PromptedTarget:
        return PromptedTarget(prompt.before, *self.prompt.with_answer(prompt, utterance.target))


def _in_canonical_order(numbers: np.ndarray, audio_ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Number shards by the smallest audio id in each.

    A reader's own numbers depend on how the store was written; these depend on the audio alone. The order of
    training is therefore the same whether features are cached, merged from several stores, or computed on the
    fly.

    Args:
        numbers: [utterances] integers: shards as the reader numbers them.
        audio_ids: [utterances, 32] uint8.

    Returns:
        The canonical shard numbers, [utterances] int32; and the reader's number for each canonical one.
    """
    # In the order of audio ids, a shard occurs first at its smallest audio id.
    by_audio_id = argsort_audio_ids(audio_ids)
    shards, first = np.unique(numbers[by_audio_id], return_index=True)
    ranked = shards[np.argsort(first)]
    rank = np.zeros(int(shards.max(initial=-1)) + 1, np.int32)
    rank[ranked] = np.arange(len(ranked))
    return rank[numbers], ranked.tolist()


@dataclass
class Window:
    """A few shards, and the optimiser steps over their utterances."""

    epoch: int
    shards: list[int]
    """By canonical number."""
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
        positions: [utterances] LLM positions.
        shards: [utterances] integers: number of the shard that contains each utterance's audio.
        window_shards: shards whose utterances are shuffled together.
        budget: maximum of each step, in LLM positions or in the unit of `sizes`; only a single utterance that
            takes more exceeds it.
        seed: seed of the order.
        epoch: number of the epoch; each epoch has its own order.
        sizes: [utterances] how much of the budget each utterance takes. If given, each step is filled up to
            the budget. If not, utterances take their positions, and steps have about equal sums.

    Yields:
        Windows; every shard is in exactly one, and every index occurs exactly once.
    """
    # `Random` hashes a text seed with SHA-512, so the order is the same on every machine and in every version
    # of Python.
    generator = random.Random(f"{seed}/{epoch}")
    cut = _cut_evenly if sizes is None else _cut_at_budget
    sizes = positions if sizes is None else sizes
    # `by_shard` lists the utterances of shard 0, then those of shard 1 and so on; those of shard s end before
    # index `ends[s]`.
    by_shard = np.argsort(shards, kind="stable")
    ends = np.searchsorted(
        shards[by_shard], np.arange(int(shards.max(initial=-1)) + 1), side="right"
    ).tolist()
    order = list(range(len(ends)))
    generator.shuffle(order)
    for begin in range(0, len(order), window_shards):
        window = order[begin : begin + window_shards]
        shuffled = [i for s in window for i in by_shard[ends[s - 1] if s else 0 : ends[s]].tolist()]
        generator.shuffle(shuffled)
        steps: list[list[int]] = []
        for pool in cut(shuffled, sizes, STEPS_PER_POOL * budget):
            # The index breaks ties, so the result does not depend on the order before.
            pool.sort(key=lambda i: (positions[i], i))
            steps += cut(pool, sizes, budget)
        generator.shuffle(steps)
        yield Window(epoch, window, steps)


@dataclass(frozen=True)
class Budget:
    """The size of an optimiser step, and of one process's micro-batch."""

    step: int
    batch: int
    fixed: bool = False
    """Whether both count utterances, as the reference implementation does, instead of LLM positions."""

    def sizes(self, positions: Sequence[int]) -> Sequence[int]:
        """Return each utterance's share of the budget [utterances], from its LLM positions [utterances]."""
        return [1] * len(positions) if self.fixed else positions


def budget_for(options: Training, processes: int) -> Budget:
    """Return the recipe's budget for a number of processes."""
    utterances = options.utterances_per_batch
    if utterances:
        return Budget(utterances * options.accumulation * processes, utterances, fixed=True)
    return Budget(options.positions_per_step, options.positions_per_batch)


class TrainingPlan:
    """All optimiser steps of a training.

    Steps do not remain in memory: each iteration plans the epochs again, with the same result.

    Args:
        examples: to train on.
        budget: of a step.
        window_shards: shards whose utterances are shuffled together.
        seed: of the order.
        epochs: passes over the examples.
        max_steps: training ends after this many steps, even within an epoch.
    """

    def __init__(
        self, examples: Examples, budget: Budget, window_shards: int, seed: int, epochs: int, max_steps: int
    ) -> None:
        self.examples, self.max_steps = examples, max_steps
        # Sizes are always given, so `plan_epoch` fills each step up to the budget instead of cutting evenly.
        sizes = budget.sizes(examples.positions)
        self._plan = lambda epoch: plan_epoch(
            examples.positions, examples.shards, window_shards, budget.step, seed, epoch, sizes
        )
        self._epochs = epochs
        self.steps = self.epochs = 0
        while self.epochs < epochs and self.steps < max_steps:
            self.steps = min(max_steps, self.steps + sum(len(w.steps) for w in self._plan(self.epochs)))
            self.epochs += 1

    def __iter__(self) -> Iterator[tuple[Window, Window | None, list[int]]]:
        """Yield (window, next window or None, indices of the utterances) for each step."""
        return self.after(0)

    def after(self, done: int) -> Iterator[tuple[Window, Window | None, list[int]]]:
        """Yield the same tuples as `__iter__`, but skip the first `done` steps."""
        windows = (window for epoch in range(self._epochs) for window in self._plan(epoch))
        pairs = itertools.pairwise(itertools.chain(windows, [None]))
        steps = (
            (window, next_window, step)
            for window, next_window in pairs
            if window is not None  # only the last next window is None
            for step in window.steps
        )
        return itertools.islice(steps, done, self.steps)


def _cut_evenly(indices: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a list into runs of about equal sums, each within the budget if possible.

    The aim is the least number of runs that the budget allows. If each run were filled up to the budget, a
    small remainder would be left for the last one: an optimiser step over few utterances, with a noisy
    gradient.

    Args:
        indices: indices into `sizes`; their order does not change.
        sizes: how much of the budget each index takes.
        budget: maximum sum of a run; only a single index that takes more exceeds it.

    Returns:
        The runs, in the order of `indices`.
    """
    rest = sum(sizes[i] for i in indices)
    runs: list[list[int]] = []
    current: list[int] = []
    size = 0
    target = rest / max(1, -(-rest // budget))
    for index in indices:
        size_with = size + sizes[index]
        # Close the run if its sum is nearer to the target without this index than with it.
        if current and (size_with > budget or size_with - target > target - size):
            runs.append(current)
            rest -= size
            # The rest is shared out again, so that rounding errors do not add up in the last run.
            target = rest / max(1, -(-rest // budget))
            current, size = [], 0
        current.append(index)
        size += sizes[index]
    if current:
        runs.append(current)
    return runs


def _cut_at_budget(indices: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a list into runs that are as full as the budget allows; the last run gets the remainder.

    Args and result are those of `_cut_evenly`.
    """
    runs: list[list[int]] = []
    # A run that counts as full, so that the first index begins a new one.
    size = budget
    for index in indices:
        if size + sizes[index] > budget:
            runs.append([])
            size = 0
        runs[-1].append(index)
        size += sizes[index]
    return runs


def split_step(
    step: list[int], positions: Sequence[int], processes: int, budget: int, sizes: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their padded micro-batches.

    Utterances are taken from the longest to the shortest, and each micro-batch is filled up before the next
    begins: utterances of similar length share a micro-batch and need little padding. Then the micro-batches
    with the most utterances are halved, until all processes can have the same number of micro-batches.

    Args:
        step: indices of the step's utterances.
        positions: LLM positions of each utterance.
        processes: number of processes that share the step.
        budget: maximum of a micro-batch in LLM positions, padding included, or in the unit of `sizes`; only a
            single utterance that takes more exceeds it.
        sizes: how much of the budget each utterance takes; by default, its positions.

    Returns:
        [process][micro-batch] → indices. All processes have the same number of micro-batches; some of these
        are empty if the step has fewer utterances than processes.
    """
    sizes = positions if sizes is None else sizes
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    groups: list[list[int]] = []
    for index in longest_first:
        # The first utterance of a group is its longest, to which all others are padded.
        if groups and sizes[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    while len(groups) % processes:
        largest = max(range(len(groups)), key=lambda g: (len(groups[g]), -g), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
        else:
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    # Neighbouring groups, whose utterances have similar lengths, are computed by different processes at the
    # same time: no process then waits long for another.
    return [groups[rank::processes] for rank in range(processes)]


def split_packed(
    step: list[int], positions: Sequence[int], processes: int, budget: int
) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their packed micro-batches.

    Packed micro-batches have no padding, so lengths may be mixed freely. Utterances are dealt out longest
    first, each to the emptiest micro-batch, so that all are about equally full and no process waits long for
    another. The number of micro-batches starts at the least that the sum of positions allows, and grows until
    all are within the budget.

    Args:
        step: indices of the step's utterances.
        positions: LLM positions of each utterance.
        processes: number of processes that share the step.
        budget: maximum LLM positions of a micro-batch; only a single utterance that is longer exceeds it.

    Returns:
        [process][micro-batch] → indices, as from `split_step`.
    """
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    rounds = max(1, -(-sum(positions[i] for i in step) // (budget * processes)))
    while True:
        groups: list[list[int]] = [[] for _ in range(rounds * processes)]
        # A heap of (positions, number) of each group.
        fill = [(0, number) for number in range(len(groups))]
        for index in longest_first:
            size, number = heapq.heappop(fill)
            groups[number].append(index)
            heapq.heappush(fill, (size + positions[index], number))
        if all(size <= budget or len(groups[number]) == 1 for size, number in fill):
            break
        rounds += 1
    # With empty groups last, all processes have work in every round of micro-batches but the last ones.
    groups.sort(key=lambda group: not group)
    return [groups[rank::processes] for rank in range(processes)]


class BatchReader:
    """Makes batches of examples, with their audio.

    Args:
        examples: the utterances.
        reader: reads their audio.
        draw: (epoch, key) → index in `examples.prompts` of the prompt that an utterance gets.
        threads: number of threads that read a batch's audio.
        packs: whether a batch's utterances are packed into one row, instead of padded to the longest.
    """

    def __init__(
        self,
        examples: Examples,
        reader: FeatureReader,
        draw: Callable[[int, str], int] = lambda epoch, key: 0,
        threads: int = 1,
        packs: bool = False,
    ) -> None:
        self.examples, self.reader, self.draw, self.packs = examples, reader, draw, packs
        self._pool = ThreadPoolExecutor(threads, "read-audio") if threads > 1 else None

    def batch(self, indices: list[int], epoch: int = 0) -> Batch:
        """Read utterances and collate or pack them.

        Args:
            indices: of the utterances. An empty list gives a batch of one utterance without targets: with
                it, a process without work takes part in the communication but adds nothing to the loss.
            epoch: decides which prompts are drawn.
        """
        utterances = [self.examples.utterances[i] for i in indices or [0]]
        audio = (self._pool.map if self._pool else map)(self.reader.read, utterances)
        rows = []
        for index, utterance, features in zip(indices or [0], utterances, audio, strict=True):
            prompted = self.examples.prompted(index, self.draw(epoch, utterance.key))
            rows.append(
                Row(
                    features,
                    int(self.examples.audio_positions[index]),
                    prompted.before,
                    prompted.prompt,
                    prompted.answer,
                )
            )
        batch = pack(rows) if self.packs else collate(rows)
        if not indices:
            batch.labels.fill_(IGNORED)
        return batch

    def targets(self, indices: Iterable[int], epoch: int = 0) -> int:
        """Count the target tokens of utterances, with the prompts drawn in an epoch."""
        utterances, targets = self.examples.utterances, self.examples.targets
        # Drawing hashes the key, so it is skipped if the result can only be 0.
        several = targets.shape[1] > 1
        return sum(int(targets[i, self.draw(epoch, utterances[i].key) if several else 0]) for i in indices)

    def enter(self, window: Window, next_window: Window | None) -> None:
        """Prepare the reader for a window: its shards are needed now, and those of the next window soon.

        The reader may fetch these shards in advance and evict all others.
        """
        shards = [*window.shards, *(next_window.shards if next_window else [])]
        self.reader.expect([self.examples.reader_shards[s] for s in shards])
