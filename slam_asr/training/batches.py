"""Which utterances make which optimiser step, and who computes what of it.

The recipe fixes LLM positions per optimiser step. Order and grouping depend on seed and epoch
alone; only the division of a step among processes depends on how many there are. Each process gets
the same number of micro-batches in each step, so that no process waits for one that has run out.

An epoch goes through the shards of the feature store in random order, a window of some of them at a
time, and through the utterances of each window in random order: every shard is needed only once.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from slam_asr.errors import UserError
from slam_asr.features.audio_source import samples_of
from slam_asr.features.index import in_order
from slam_asr.features.reader import FeatureReader
from slam_asr.manifest import Utterance
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt, TokenizedPrompt
from slam_asr.models.slam import IGNORED, Batch, Row, collate, pack
from slam_asr.recipe import Projector, Training

STEPS_PER_POOL = 16
"""Utterances of about this many steps are sorted by length together: less padding, and still a
random mixture, since the steps of a window are shuffled afterwards."""


@dataclass
class PromptedTarget:
    """An utterance's text with one of the prompts."""

    before: list[int]
    """Token ids in front of the audio."""
    prompt: list[int]
    answer: list[int]
    """Token ids with the end: the targets."""

    @property
    def positions(self) -> int:
        """LLM positions of all text."""
        return len(self.before) + len(self.prompt) + len(self.answer)


class Examples:
    """Utterances as the LLM will see them, without their audio: some numbers for each, text as it is needed.

    Args:
        utterances: of a manifest.
        reader: knows how long their audio is, and where it lies.
        projector: how many positions that makes.
        prompt: as the LLM's tokenizer spells it.
        spellings: of it, those that may be drawn.
        limit: positions that the LLM can hold, or None.

    Raises:
        UserError: an utterance without features, or one that does not fit the LLM.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        reader: FeatureReader,
        projector: Projector,
        prompt: Prompt,
        spellings: list[TokenizedPrompt],
        limit: int | None,
    ) -> None:
        self.utterances, self.prompt, self.spellings = utterances, prompt, spellings
        count = len(utterances)
        self.audio = np.zeros(count, np.int32)
        """[utterances] audio positions."""
        self.answers = np.zeros((count, len(spellings)), np.int32)
        """[utterances, spellings] target tokens."""
        self.positions: list[int] = []
        """LLM positions, audio and text, with the longest prompt: batches hold whichever is drawn."""
        self.hours = 0.0
        addresses, samples = bytearray(), []
        for at, utterance in enumerate(utterances):
            addresses += bytes.fromhex(utterance.audio_id)
            samples.append(samples_of(utterance))
            spoken = [self._spell(utterance, s) for s in spellings]
            self.audio[at] = positions_of(projector, reader.span(utterance))
            self.answers[at] = [len(s.answer) for s in spoken]
            longest = max(spoken, key=lambda s: s.positions)
            self.positions.append(int(self.audio[at]) + longest.positions)
            self.hours += (utterance.duration or 0.0) / 3600
            if limit is not None and self.positions[-1] > limit:
                raise UserError(
                    f"Utterance {utterance.key} needs {self.positions[-1]} LLM positions (audio {self.audio[at]}, prompt "
                    f"{len(longest.before) + len(longest.prompt)}, answer {len(longest.answer)}) but the LLM holds {limit}: shorten "
                    "it with data.max_duration, or the prompt."
                )
        columns = np.frombuffer(bytes(addresses), np.uint8).reshape(-1, 32)
        self.shards, self.reader_shards = _in_canonical_order(
            reader.shards_of(columns, np.array(samples, np.int64)), columns
        )

    def __len__(self) -> int:
        return len(self.utterances)

    def spoken(self, at: int, spelling: int) -> PromptedTarget:
        """The text of an utterance with one of the prompts."""
        return self._spell(self.utterances[at], self.spellings[spelling])

    def _spell(self, utterance: Utterance, spelling: TokenizedPrompt) -> PromptedTarget:
        return PromptedTarget(spelling.before, *self.prompt.with_answer(spelling, utterance.target))


def _in_canonical_order(numbers: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Shards counted anew, in the order of the smallest address in each: the same wherever the features lie.

    Args:
        numbers: [utterances] of shards, as a reader counts them.
        addresses: [utterances, 32] of audio.

    Returns:
        [utterances] of shards, counted anew; and for each of these the reader's number.
    """
    by_address = in_order(addresses)
    shards, first = np.unique(numbers[by_address], return_index=True)
    ranked = shards[np.argsort(first)]
    rank = np.zeros(int(shards.max(initial=-1)) + 1, np.int32)
    rank[ranked] = np.arange(len(ranked))
    return rank[numbers], ranked.tolist()


@dataclass
class Window:
    """Some shards, and the optimiser steps over their utterances."""

    epoch: int
    shards: list[int]
    steps: list[list[int]]
    """For each, the indices of its utterances."""


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
        positions: LLM positions of each utterance.
        shards: [utterances] in which each one's audio lies.
        window_shards: shards whose utterances are mixed with each other.
        budget: positions a step; exceeded only by an utterance that is longer by itself.
        seed: of the order.
        epoch: each has its own order.
        sizes: what each utterance takes of the budget, if not its positions.

    Returns:
        Windows; every shard is in exactly one, and every index occurs exactly once.
    """
    # Seeding by text goes through SHA-512: the same order on every machine and Python version.
    generator = random.Random(f"{seed}/{epoch}")
    divide = _divide if sizes is None else _fill
    sizes = positions if sizes is None else sizes
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
        for pool in divide(shuffled, sizes, STEPS_PER_POOL * budget):
            pool.sort(key=lambda i: (positions[i], i))
            steps += divide(pool, sizes, budget)
        generator.shuffle(steps)
        yield Window(epoch, window, steps)


@dataclass(frozen=True)
class Budget:
    """How much goes into a step, and into what one process computes at once."""

    step: int
    batch: int
    fixed: bool = False
    """Whether these are utterances, as the reference counts them, and not LLM positions."""

    def sizes(self, positions: Sequence[int]) -> Sequence[int]:
        """What each utterance takes of it."""
        return [1] * len(positions) if self.fixed else positions


def budget_of(options: Training, processes: int) -> Budget:
    """The recipe's budget for so many processes."""
    each = options.utterances_per_batch
    if each:
        return Budget(each * options.accumulation * processes, each, fixed=True)
    return Budget(options.positions_per_step, options.positions_per_batch)


class TrainingPlan:
    """Every optimiser step of a training; they are planned again when they are needed, and take no memory.

    Args:
        examples: to train on.
        budget: of a step.
        window_shards: shards whose utterances are mixed.
        seed: of the order.
        epochs: passes over the examples.
        max_steps: at which the training ends in any case.
    """

    def __init__(
        self, examples: Examples, budget: Budget, window_shards: int, seed: int, epochs: int, max_steps: int
    ) -> None:
        self.examples, self.max_steps = examples, max_steps
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
        """Each step with the window that it belongs to and the one behind that."""
        return self.after(0)

    def after(self, done: int) -> Iterator[tuple[Window, Window | None, list[int]]]:
        """Each step after the first `done`, with the window that it belongs to and the one behind that."""
        windows = (window for epoch in range(self._epochs) for window in self._plan(epoch))
        pairs = itertools.pairwise(itertools.chain(windows, [None]))
        steps = ((window, behind, step) for window, behind in pairs for step in window.steps)
        return itertools.islice(steps, done, self.steps)


def _divide(indices: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a list into runs of about equal sums, none above the budget where that is possible."""
    rest = sum(sizes[i] for i in indices)
    parts: list[list[int]] = []
    current: list[int] = []
    size = 0
    target = rest / max(1, -(-rest // budget))
    for index in indices:
        size_with = size + sizes[index]
        # Close the run where that comes nearer to the even share than going on.
        if current and (size_with > budget or size_with - target > target - size):
            parts.append(current)
            rest -= size
            target = rest / max(1, -(-rest // budget))
            current, size = [], 0
        current.append(index)
        size += sizes[index]
    if current:
        parts.append(current)
    return parts


def _fill(indices: list[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a list into runs that are as full as the budget allows; the last one has the rest."""
    parts: list[list[int]] = []
    size = budget
    for index in indices:
        if size + sizes[index] > budget:
            parts.append([])
            size = 0
        parts[-1].append(index)
        size += sizes[index]
    return parts


def split_step(
    step: list[int], positions: Sequence[int], processes: int, budget: int, sizes: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their micro-batches.

    Args:
        step: indices of the step's utterances.
        positions: LLM positions of each utterance.
        processes: how many share the step.
        budget: positions, padding included, that a process puts through the LLM at once; exceeded
            only by an utterance that is longer by itself.
        sizes: what each utterance takes of the budget, if not its positions.

    Returns:
        [process][micro-batch] → indices. Every process has equally many micro-batches; one may be
        empty where there are fewer utterances than processes.
    """
    sizes = positions if sizes is None else sizes
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    groups: list[list[int]] = []
    for index in longest_first:
        # The first of a group is its longest, which all the others are padded to.
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
    return [groups[rank::processes] for rank in range(processes)]


def split_packed(
    step: list[int], positions: Sequence[int], processes: int, budget: int
) -> list[list[list[int]]]:
    """The same where a batch has no padding: as few micro-batches as hold the step, all about equally full."""
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    rounds = max(1, -(-sum(positions[i] for i in step) // (budget * processes)))
    while True:
        groups: list[list[int]] = [[] for _ in range(rounds * processes)]
        # (positions, number) of each group: the next longest goes to the emptiest.
        fill = [(0, number) for number in range(len(groups))]
        for index in longest_first:
            size, number = heapq.heappop(fill)
            groups[number].append(index)
            heapq.heappush(fill, (size + positions[index], number))
        if all(size <= budget or len(groups[number]) == 1 for size, number in fill):
            break
        rounds += 1
    # Empty ones last, so that all of a round's processes have something, if any do.
    groups.sort(key=lambda group: not group)
    return [groups[rank::processes] for rank in range(processes)]


class BatchReader:
    """Makes batches of examples with their audio.

    Args:
        examples: what is said.
        reader: gives the audio.
        draw: (epoch, key) → which of an example's prompts it gets.
        threads: that read the audio of a batch together.
        packs: whether the utterances of a batch stand in one row.
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
        """The utterances side by side, or in one row.

        An empty list gives one utterance without targets: a process that has nothing to do in a
        micro-batch goes through the same motions, with no effect on the loss.
        """
        chosen = [self.examples.utterances[i] for i in indices or [0]]
        audio = (self._pool.map if self._pool else map)(self.reader.read, chosen)
        rows = []
        for index, utterance, heard in zip(indices or [0], chosen, audio, strict=True):
            spoken = self.examples.spoken(index, self.draw(epoch, utterance.key))
            rows.append(
                Row(heard, int(self.examples.audio[index]), spoken.before, spoken.prompt, spoken.answer)
            )
        batch = pack(rows) if self.packs else collate(rows)
        if not indices:
            batch.labels.fill_(IGNORED)
        return batch

    def targets(self, indices: Iterable[int], epoch: int = 0) -> int:
        """Target tokens of these utterances."""
        utterances, answers = self.examples.utterances, self.examples.answers
        several = answers.shape[1] > 1
        return sum(int(answers[i, self.draw(epoch, utterances[i].key) if several else 0]) for i in indices)

    def enter(self, window: Window, behind: Window | None) -> None:
        """Be told that a window begins: its audio is needed now, that of the one behind it soon."""
        shards = [*window.shards, *(behind.shards if behind else [])]
        self.reader.expect([self.examples.reader_shards[s] for s in shards])
