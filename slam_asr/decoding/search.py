"""Finding the transcript: greedy or beam search through the frozen LLM."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam, collate
from slam_asr.recipe import Decoding


@dataclass
class Answer:
    """What the LLM said to one utterance."""

    text: str
    cut: bool
    """Whether it was still talking at `max_new_tokens`."""


class Searcher:
    """Decodes batches of encoder outputs.

    Args:
        model: projector and LLM, on one device.
        prompt: what stands behind the audio.
        options: beams, penalties, limits.
    """

    def __init__(self, model: Slam, prompt: Prompt, options: Decoding) -> None:
        self.model, self.prompt = model, prompt
        eos = prompt.tokenizer.eos_token_id
        # A configuration of our own: whatever sampling the LLM's folder asks for stays out of a measurement.
        self.generation = GenerationConfig(
            num_beams=options.beams, do_sample=False, max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty, length_penalty=options.length_penalty,
            eos_token_id=eos, pad_token_id=eos,
        )
        model.llm.generation_config = self.generation

    @torch.inference_mode()
    def decode(self, frames: list[torch.Tensor]) -> list[Answer]:
        """Encoder outputs, each [frames, encoder width] → an answer each."""
        device = self.model.llm.device
        positions = [self.model.projector.positions(len(f)) for f in frames]
        batch = collate(frames, positions, [self.prompt.ids] * len(frames), [[]] * len(frames)).to(device)
        generated = self.model.llm.generate(
            inputs_embeds=self.model.embed(batch), attention_mask=batch.mask, generation_config=self.generation
        )
        eos = self.prompt.tokenizer.eos_token_id
        return [
            Answer(self.prompt.answer_of(ids), cut=eos not in ids and len(ids) >= self.generation.max_new_tokens)
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
