"""Finding the transcript: greedy or beam search through the LLM."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessor

from slam_asr.models.beam_search import CLOSE, Found
from slam_asr.models.encoder import Prepared
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Row, Slam, collate
from slam_asr.recipe import Decoding


@dataclass
class Choice:
    """One of several answers."""

    text: str
    score: float
    """Log probability of the text and its end, after the repetition penalty, per token to the power of `decoding.length_penalty`; higher is better."""


@dataclass
class Answer:
    """What the LLM said to one utterance."""

    text: str
    cut: bool
    """Whether it was still talking at `max_new_tokens`."""
    ids: list[int]
    """Token ids as generated: with the end, and what fills the row after it."""
    close: bool | None = False
    """Whether rounding may have decided: somewhere the two best choices were less than `CLOSE` apart. None where that is not known."""
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
        inference_only: whether the model will not be trained any more.
    """

    def __init__(self, model: Slam, prompt: Prompt, options: Decoding, inference_only: bool = True) -> None:
        self.model, self.prompt, self.inference_only = model, prompt, inference_only
        # A configuration of our own: whatever sampling the LLM's folder asks for stays out of a measurement.
        self.generation = GenerationConfig(
            num_beams=options.beams,
            num_return_sequences=options.nbest,
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            length_penalty=options.length_penalty,
            eos_token_id=prompt.stops,
            pad_token_id=prompt.end,
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
        with torch.inference_mode() if self.inference_only else torch.no_grad():
            # While it is trained, all processes that share the LLM's weights must call it equally often, as `generate` does.
            if self.inference_only or self.generation.num_beams > 1:
                found = self.model.search(batch, self.generation)
                if found is not None:
                    return self._best_of(found)
            watch = self._watch()
            answers = [
                self._answer(ids) for ids in self.model.generate(batch, self.generation, watch).tolist()
            ]
            if watch is not None and watch.close is not None:
                for answer, close in zip(answers, watch.close.tolist(), strict=True):
                    answer.close = close
        return answers

    def _best_of(self, found: Found) -> list[Answer]:
        answers = []
        for ids, scores, close in zip(
            found.ids.tolist(), found.scores.tolist(), found.close or [None] * len(found.ids), strict=True
        ):
            answer = self._answer(ids[0])
            answer.close = close
            if len(ids) > 1:
                answer.choices = [
                    Choice(self.prompt.answer_of(row), score) for row, score in zip(ids, scores, strict=True)
                ]
            answers.append(answer)
        return answers

    def _watch(self) -> CloseCalls | None:
        if not self.inference_only:
            return None
        return CloseCalls(torch.tensor(self.prompt.stops, device=self.model.llm.device))

    def _answer(self, ids: list[int]) -> Answer:
        cut = not set(self.prompt.stops) & set(ids) and len(ids) >= self.generation.max_new_tokens
        return Answer(self.prompt.answer_of(ids), cut, ids)


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
