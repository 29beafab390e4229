"""Which utterances make which optimiser step, and who computes what of it.

The recipe fixes LLM positions per optimiser step. Order and grouping depend on seed and epoch
alone; only the division of a step among processes depends on how many there are. Each process gets
the same number of micro-batches in each step, so that no process waits for one that has run out.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from slam_asr.errors import UserError
from slam_asr.features.reader import Reader
from slam_asr.features.store import address_of
from slam_asr.manifest import Utterance
from slam_asr.models.projector import positions_of
from slam_asr.models.prompt import Prompt, Spelling
from slam_asr.models.slam import IGNORED, Batch, Row, collate
from slam_asr.recipe import Projector

STEPS_PER_POOL = 16
"""Utterances of about this many steps are sorted by length together: less padding, and still a
random mixture, since the steps of all pools are shuffled afterwards."""


@dataclass
class Spoken:
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


@dataclass
class Example:
    """An utterance as the LLM will see it, without its audio."""

    key: str
    address: str
    """Of its audio."""
    audio: int
    """Audio positions."""
    spoken: list[Spoken]
    """With each prompt that may be drawn for it."""

    @property
    def positions(self) -> int:
        """LLM positions, audio and text, with the longest prompt: batches hold whichever is drawn."""
        return self.audio + max(s.positions for s in self.spoken)


def make_examples(
    utterances: Iterable[Utterance], reader: Reader, projector: Projector, prompt: Prompt, spellings: list[Spelling],
    limit: int | None,
) -> list[Example]:
    """Tokenise utterances and count their positions.

    Args:
        utterances: of a manifest.
        reader: knows how long their audio is.
        projector: how many positions that makes.
        prompt: as the LLM's tokenizer spells it.
        spellings: of it, those that may be drawn.
        limit: positions that the LLM can hold, or None.

    Raises:
        UserError: an utterance without features, or one that does not fit the LLM.
    """
    examples = []
    for utterance in utterances:
        address = address_of(utterance)
        spoken = [Spoken(s.before, *prompt.with_answer(s, utterance.target)) for s in spellings]
        example = Example(utterance.key, address, positions_of(projector, reader.span(address)), spoken)
        if limit is not None and example.positions > limit:
            longest = max(spoken, key=lambda s: s.positions)
            raise UserError(
                f"Utterance {utterance.key} needs {example.positions} LLM positions (audio {example.audio}, prompt "
                f"{len(longest.before) + len(longest.prompt)}, answer {len(longest.answer)}) but the LLM holds {limit}: shorten "
                "it with data.max_duration, or the prompt."
            )
        examples.append(example)
    return examples


def plan_epoch(positions: list[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Group utterances into the optimiser steps of one epoch.

    Args:
        positions: LLM positions of each utterance.
        budget: positions a step; exceeded only by an utterance that is longer by itself.
        seed: of the order.
        epoch: each has its own order.

    Returns:
        For each step, the indices of its utterances; every index occurs exactly once.
    """
    # Seeding by text goes through SHA-512: the same order on every machine and Python version.
    shuffled = list(range(len(positions)))
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(shuffled)
    steps: list[list[int]] = []
    for pool in _divide(shuffled, positions, STEPS_PER_POOL * budget):
        pool.sort(key=lambda i: (positions[i], i))
        steps += _divide(pool, positions, budget)
    generator.shuffle(steps)
    return steps


def _divide(indices: list[int], positions: list[int], budget: int) -> list[list[int]]:
    """Cut a list into runs of about equal sums, none above the budget where that is possible."""
    rest = sum(positions[i] for i in indices)
    parts: list[list[int]] = []
    current: list[int] = []
    size = 0
    target = rest / max(1, -(-rest // budget))
    for index in indices:
        size_with = size + positions[index]
        # Close the run where that comes nearer to the even share than going on.
        if current and (size_with > budget or size_with - target > target - size):
            parts.append(current)
            rest -= size
            target = rest / max(1, -(-rest // budget))
            current, size = [], 0
        current.append(index)
        size += positions[index]
    if current:
        parts.append(current)
    return parts


def split_step(step: list[int], positions: list[int], processes: int, budget: int) -> list[list[list[int]]]:
    """Divide a step's utterances among processes and their micro-batches.

    Args:
        step: indices of the step's utterances.
        positions: LLM positions of each utterance.
        processes: how many share the step.
        budget: positions, padding included, that a process puts through the LLM at once; exceeded
            only by an utterance that is longer by itself.

    Returns:
        [process][micro-batch] → indices. Every process has equally many micro-batches; one may be
        empty where there are fewer utterances than processes.
    """
    longest_first = sorted(step, key=lambda i: (-positions[i], i))
    groups: list[list[int]] = []
    for index in longest_first:
        # The first of a group is its longest, which all the others are padded to.
        if groups and positions[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
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


class BatchReader:
    """Makes batches of examples with their audio.

    Args:
        examples: from `make_examples`.
        reader: gives the audio.
        draw: (epoch, key) → which of an example's prompts it gets.
    """

    def __init__(self, examples: list[Example], reader: Reader, draw: Callable[[int, str], int] = lambda epoch, key: 0) -> None:
        self.examples, self.reader, self.draw = examples, reader, draw
        self.positions = [e.positions for e in examples]

    def batch(self, indices: list[int], epoch: int = 0) -> Batch:
        """The utterances side by side.

        An empty list gives one utterance without targets: a process that has nothing to do in a
        micro-batch goes through the same motions, with no effect on the loss.
        """
        rows = []
        for index in indices or [0]:
            example, spoken = self.examples[index], self._spoken(index, epoch)
            rows.append(Row(self.reader.read(example.address), example.audio, spoken.before, spoken.prompt, spoken.answer))
        batch = collate(rows)
        if not indices:
            batch.labels.fill_(IGNORED)
        return batch

    def targets(self, indices: Iterable[int], epoch: int = 0) -> int:
        """Target tokens of these utterances."""
        return sum(len(self._spoken(i, epoch).answer) for i in indices)

    def _spoken(self, index: int, epoch: int) -> Spoken:
        example = self.examples[index]
        return example.spoken[self.draw(epoch, example.key)]


def training_steps(positions: list[int], budget: int, seed: int, epochs: int, max_steps: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, indices) of every optimiser step of a training."""
    done = 0
    for epoch in range(epochs):
        for step in plan_epoch(positions, budget, seed, epoch):
            if done == max_steps:
                return
            done += 1
            yield epoch, step
