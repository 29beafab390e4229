"""Decodes batches of audio to transcripts, by greedy or beam search through the LLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessor

from slam_asr.config.recipe import Decoding
from slam_asr.generation.beam_search import Answers
from slam_asr.generation.search_state import NEARLY_TIED
from slam_asr.models.batch import Row, collate
from slam_asr.models.encoders.frontend import Prepared
from slam_asr.models.grouping import longest_first, padded_batches
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam


@dataclass
class Choice:
    """One entry of an n-best list."""

    text: str
    score: float
    """Score of the text and its end token, as in `Answers.scores`. Higher is better."""


@dataclass
class Answer:
    """The transcript that the LLM generated for one utterance."""

    text: str
    cut: bool
    """Whether `max_new_tokens` was reached before the answer ended."""
    ids: list[int]
    """Token ids as generated, including the end token and the padding after it."""
    close: bool | None = False
    """Whether rounding may have decided the text, because the scores of competing choices differed by less
    than `NEARLY_TIED` at some step. None if not known. In training, nothing is recorded and it is False."""
    choices: list[Choice] = field(default_factory=list)
    """The n-best list, which starts with this answer; empty if `decoding.nbest` is 1."""


class CloseCalls(LogitsProcessor):
    """Finds the utterances for which transformers' greedy search met two nearly tied best tokens.

    Args:
        stops: [stops] int64, ids of the tokens that end an answer.
    """

    def __init__(self, stops: torch.Tensor) -> None:
        self.stops = stops
        self.close: torch.Tensor | None = None
        """[utterances] bool: True if the best tokens were nearly tied at any step so far. None before the
        first step."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [utterances, vocabulary] unchanged; `input_ids` are [utterances, tokens so far]."""
        # Logits can replace log probabilities here: both have the same differences.
        first, second = scores.topk(2).values.unbind(1)
        # Steps after the end of an answer do not count.
        nearly_tied = (first - second < NEARLY_TIED) & ~torch.isin(input_ids, self.stops).any(1)
        self.close = nearly_tied if self.close is None else self.close | nearly_tied
        return scores


class Searcher:
    """Decodes batches of utterances with a loaded model.

    Args:
        model: on one device.
        prompt: the prompts; decoding uses `prompt.main`.
        options: beams, penalties and limits.
        inference_only: False if the model is being trained. Then its tensors must stay usable for gradients,
            and processes that share its weights must run the LLM equally often.
    """

    def __init__(self, model: Slam, prompt: Prompt, options: Decoding, inference_only: bool = True) -> None:
        self.model, self.prompt, self.inference_only = model, prompt, inference_only
        # The sample transcripts of a training run come from the LLM alone, without CTC's scores.
        self.ctc_weight = options.ctc_weight if inference_only else 0.0
        self.generation = generation_of(options, prompt)
        self.generation.num_return_sequences = options.nbest
        # This also replaces the LLM's own generation_config.json, from which `generate` would take unset
        # options: its sampling options must not affect a measurement.
        model.llm.generation_config = self.generation

    def decode(self, audio: Sequence[torch.Tensor | Prepared], positions: Sequence[int]) -> list[Answer]:
        """Decode a batch without recording gradients.

        Args:
            audio: features, each [frames, encoder width], or the inputs of the model's encoder.
            positions: number of LLM positions of each utterance's audio.

        Returns:
            One answer per utterance, in the same order.
        """
        prompt = self.prompt.main
        rows = [Row(a, n, prompt.before, prompt.ids, []) for a, n in zip(audio, positions, strict=True)]
        batch = collate(rows).to(self.model.llm.device)
        # Sharded weights that are gathered in inference mode could not be used for training afterwards.
        with torch.inference_mode() if self.inference_only else torch.no_grad():
            # In training, processes with sharded weights must all run the LLM equally often, even if their
            # answers end at different steps. transformers' `generate` ensures this; our search does not.
            if self.inference_only:
                found = self.model.search(batch, self.generation, self.ctc_weight)
                if found is not None:
                    return self._from_search(found)
            # In training, close calls are not recorded.
            watch = CloseCalls(torch.tensor(self.prompt.stops, device=batch.mask.device))
            output = self.model.generate(batch, self.generation, watch if self.inference_only else None)
            ids = output.sequences.tolist()
            close = [False] * len(ids) if watch.close is None else watch.close.tolist()
        return [self._answer(*pair) for pair in zip(ids, close, strict=True)]

    def _from_search(self, found: Answers) -> list[Answer]:
        answers = []
        nearly_tied: Sequence[bool | None] = found.nearly_tied or [None] * len(found.ids)
        for ids, scores, close in zip(found.ids.tolist(), found.scores.tolist(), nearly_tied, strict=True):
            answers.append(self._answer(ids[0], close))
            if len(ids) > 1:
                texts = map(self.prompt.answer_of, ids)
                answers[-1].choices = [Choice(*choice) for choice in zip(texts, scores, strict=True)]
        return answers

    def _answer(self, ids: list[int], close: bool | None) -> Answer:
        # An answer whose end token is the last one that fits is complete. The length alone would count it as
        # cut.
        cut = not set(self.prompt.stops) & set(ids) and len(ids) >= self.generation.max_new_tokens
        return Answer(self.prompt.answer_of(ids), cut, ids, close)


def generation_of(options: Decoding, prompt: Prompt) -> GenerationConfig:
    """Return transformers' configuration of a search for the best answer."""
    return GenerationConfig(
        num_beams=options.beams,
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty,
        length_penalty=options.length_penalty,
        eos_token_id=prompt.stops,
        pad_token_id=prompt.end,
    )


def plan_batches(positions: list[int], max_new_tokens: int, beams: int, budget: int) -> list[list[int]]:
    """Group utterances of similar length, longest first, into batches of at most `budget` LLM positions.

    Args:
        positions: number of LLM positions of each utterance's audio and prompt.
        max_new_tokens: positions reserved for the answer.
        beams: number of beams per utterance.
        budget: maximum number of positions of a batch, including padding. Only a single utterance that is
            longer by itself may exceed it.

    Returns:
        Indices of each batch's utterances.
    """
    # Each beam counts with a copy of its audio and prompt. LLMs whose beams cannot share this prefix do need
    # the copies.
    sizes = [(n + max_new_tokens) * beams for n in positions]
    return padded_batches(sizes, budget, longest_first(sizes))
