"""Finding the transcript: greedy or beam search through the LLM."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor

from slam_asr.models.encoder import Prepared
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import IGNORED, Row, Slam, collate
from slam_asr.recipe import Decoding

CLOSE = 1e-4
"""Difference in log probability below which rounding may decide between two choices."""


@dataclass
class Choice:
    """One of several answers."""

    text: str
    score: float
    """Log probability of the text and its end, per token to the power of `decoding.length_penalty`; higher is better."""


@dataclass
class Answer:
    """What the LLM said to one utterance."""

    text: str
    cut: bool
    """Whether it was still talking at `max_new_tokens`."""
    ids: list[int]
    """Token ids as generated: with the end, and what fills the row after it."""
    close: bool = False
    """Whether rounding may have decided: somewhere the two best choices were less than `CLOSE` apart. Known of greedy search, and of several answers."""
    choices: list[Choice] = field(default_factory=list)
    """The best answers, this one first, where several are asked for."""


class CloseCalls(LogitsProcessor):
    """Watches greedy search for steps whose two best tokens are hardly apart.

    Args:
        stops: tokens that end an answer.
    """

    def __init__(self, stops: torch.Tensor) -> None:
        self.stops = stops
        self.close: torch.Tensor | None = None
        """[utterances] bool, once there was a step."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [utterances, vocabulary] as they are."""
        first, second = scores.topk(2).values.unbind(1)
        near = (first - second < CLOSE) & ~torch.isin(input_ids, self.stops).any(1)
        self.close = near if self.close is None else self.close | near
        return scores


class Searcher:
    """Decodes batches of audio.

    Args:
        model: projector and LLM, on one device.
        prompt: what stands behind the audio.
        options: beams, penalties, limits.
        for_good: whether the model will not be trained any more.
    """

    def __init__(self, model: Slam, prompt: Prompt, options: Decoding, for_good: bool = True) -> None:
        self.model, self.prompt, self.for_good = model, prompt, for_good
        # A configuration of our own: whatever sampling the LLM's folder asks for stays out of a measurement.
        self.generation = GenerationConfig(
            num_beams=options.beams, num_return_sequences=options.nbest, do_sample=False, max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty, length_penalty=options.length_penalty,
            eos_token_id=prompt.stops, pad_token_id=prompt.end,
        )
        model.llm.generation_config = self.generation

    def decode(self, audio: list[torch.Tensor | Prepared], positions: list[int]) -> list[Answer]:
        """Find the answers to a batch; nothing is kept for gradients.

        Args:
            audio: encoder outputs, each [frames, encoder width], or what the model's encoder takes.
            positions: LLM positions of each.
        """
        spelling = self.prompt.main
        rows = [Row(a, n, spelling.before, spelling.ids, []) for a, n in zip(audio, positions, strict=True)]
        batch = collate(rows).to(self.model.llm.device)
        # Weights that an engine puts together meanwhile must be fit for training afterwards.
        with torch.inference_mode() if self.for_good else torch.no_grad():
            watch = self._watch()
            generated = self.model.generate(batch, self.generation, watch).tolist()
            of_each = self.generation.num_return_sequences
            found = [generated[at : at + of_each] for at in range(0, len(generated), of_each)]
            answers = [self._answer(ids[0]) for ids in found]
            if of_each > 1:
                for answer, row, ids in zip(answers, rows, found, strict=True):
                    answer.choices = self._choices(row, ids)
                    answer.close = abs(answer.choices[0].score - answer.choices[1].score) < CLOSE
            elif watch is not None and watch.close is not None:
                for answer, close in zip(answers, watch.close.tolist(), strict=True):
                    answer.close = close
        return answers

    def _watch(self) -> CloseCalls | None:
        if self.generation.num_beams > 1 or not self.for_good:
            return None
        return CloseCalls(torch.tensor(self.prompt.stops, device=self.model.llm.device))

    def _answer(self, ids: list[int]) -> Answer:
        cut = not set(self.prompt.stops) & set(ids) and len(ids) >= self.generation.max_new_tokens
        return Answer(self.prompt.answer_of(ids), cut, ids)

    def _choices(self, row: Row, found: list[list[int]]) -> list[Choice]:
        """What is known of an utterance's answers, in their order; their scores take one more pass over them."""
        ended = [self._up_to_the_end(ids) for ids in found]
        batch = collate([replace(row, answer=ids) for ids in ended]).to(self.model.llm.device)
        logits = self.model(batch).float()
        costs = functional.cross_entropy(logits, batch.labels[batch.labels != IGNORED], reduction="none")
        return [
            Choice(self.prompt.answer_of(ids), -float(cost.sum()) / len(ids) ** self.generation.length_penalty)
            for ids, cost in zip(ended, costs.split([len(ids) for ids in ended]), strict=True)
        ]

    def _up_to_the_end(self, ids: list[int]) -> list[int]:
        stops = set(self.prompt.stops)
        return ids[: next((at + 1 for at, token in enumerate(ids) if token in stops), len(ids))]


def plan_batches(positions: list[int], room: int, beams: int, budget: int) -> Iterator[list[int]]:
    """Group utterances of like length, longest first, into batches of at most `budget` LLM positions.

    Args:
        positions: audio and prompt positions of each utterance.
        room: positions kept for the answer.
        beams: hypotheses that each utterance takes.
        budget: positions of a batch, padding included; exceeded only by a single utterance.
    """
    batch: list[int] = []
    for index in sorted(range(len(positions)), key=lambda i: (-positions[i], i)):
        longest = positions[batch[0] if batch else index] + room
        if batch and longest * beams * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
