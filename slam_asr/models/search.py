"""Finding the transcript: greedy or beam search through the LLM."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from slam_asr.models.encoder import Prepared
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Row, Slam, collate
from slam_asr.recipe import Decoding


@dataclass
class Answer:
    """What the LLM said to one utterance."""

    text: str
    cut: bool
    """Whether it was still talking at `max_new_tokens`."""
    ids: list[int]
    """Token ids as generated: with the end, and what fills the row after it."""


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
            num_beams=options.beams, do_sample=False, max_new_tokens=options.max_new_tokens,
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
            generated = self.model.generate(batch, self.generation)
        stops = set(self.prompt.stops)
        return [
            Answer(self.prompt.answer_of(ids), cut=not stops & set(ids) and len(ids) >= self.generation.max_new_tokens, ids=ids)
            for ids in generated.tolist()
        ]


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
