"""Transcribes a few dev utterances during training.

The loss shows that the model learns; transcripts show what it learns.
"""

import random
from dataclasses import dataclass, replace

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import score
from slam_asr.config.recipe import Recipe
from slam_asr.models.prompt import Prompt
from slam_asr.models.searcher import Searcher, plan_batches
from slam_asr.models.slam import Slam
from slam_asr.training.batches import BatchReader


@dataclass
class Samples:
    """The transcripts of one validation."""

    wer: float | None
    """Word error rate of greedy decoding, as a fraction; None if the references contain no words."""
    texts: list[dict[str, str]]
    """`key`, `reference` and `hypothesis` of each utterance."""


class SampleTranscriber:
    """Transcribes the same dev utterances at each validation.

    All processes transcribe all of them: gathering sharded weights is a collective operation, in which every
    process must take part equally often.

    Args:
        reader: reader of the dev set.
        prompt: the recipe's prompts, tokenised.
        recipe: sets the number of utterances and the decoding limits.
    """

    def __init__(self, reader: BatchReader, prompt: Prompt, recipe: Recipe) -> None:
        self.reader, self.prompt = reader, prompt
        self.options = replace(recipe.decoding, beams=1)
        count = len(reader.examples)
        draw = random.Random(f"{recipe.training.seed}/samples")
        self.indices = sorted(draw.sample(range(count), min(recipe.training.samples, count)))

    def transcribe(self, model: Slam) -> Samples:
        """Transcribe the chosen utterances greedily with the current weights."""
        examples = self.reader.examples
        searcher = Searcher(model, self.prompt, self.options, inference_only=False)
        prompt_positions = len(self.prompt.main.before) + len(self.prompt.main.ids)
        positions = [int(examples.audio_positions[i]) + prompt_positions for i in self.indices]
        texts_by_index: dict[int, str] = {}
        for batch in plan_batches(
            positions, self.options.max_new_tokens, 1, self.options.positions_per_batch
        ):
            indices = [self.indices[i] for i in batch]
            audio = [self.reader.reader.read(examples.utterances[i]) for i in indices]
            hypotheses = searcher.decode(audio, [int(examples.audio_positions[i]) for i in indices])
            texts_by_index |= dict(zip(indices, (h.text for h in hypotheses), strict=True))
        rows = [
            Hypothesis(examples.utterances[i].key, examples.utterances[i].target, texts_by_index[i])
            for i in self.indices
        ]
        errors = score(rows)
        texts = [{"key": row.key, "reference": row.reference, "hypothesis": row.hypothesis} for row in rows]
        return Samples(errors.wer if errors.words else None, texts)
