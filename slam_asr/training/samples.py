"""Transcripts of a few dev utterances while training: the loss says that something is learnt, these say what."""

import random
from dataclasses import dataclass, replace

from slam_asr.models.prompt import Prompt
from slam_asr.models.search import Searcher, plan_batches
from slam_asr.models.slam import Slam
from slam_asr.recipe import Recipe
from slam_asr.scoring.metrics import score
from slam_asr.scoring.wer import Hypothesis
from slam_asr.training.batches import BatchReader


@dataclass
class Samples:
    """What the model writes at one moment."""

    wer: float | None
    """Word error rate as a fraction, greedy; None where the references hold no words."""
    texts: list[dict[str, str]]
    """key, reference and hypothesis of each."""


class Sampler:
    """Transcribes the same utterances of the dev set again and again; all processes do so alike.

    Args:
        reader: of the dev set.
        prompt: what stands around the audio.
        recipe: how many, and the limits of decoding.
    """

    def __init__(self, reader: BatchReader, prompt: Prompt, recipe: Recipe) -> None:
        self.reader, self.prompt = reader, prompt
        self.options = replace(recipe.decoding, beams=1)
        count = len(reader.examples)
        draw = random.Random(f"{recipe.training.seed}/samples")
        self.chosen = sorted(draw.sample(range(count), min(recipe.training.samples, count)))

    def transcribe(self, model: Slam) -> Samples:
        """What the model writes now."""
        examples = self.reader.examples
        searcher = Searcher(model, self.prompt, self.options, inference_only=False)
        head = len(self.prompt.main.before) + len(self.prompt.main.ids)
        positions = [int(examples.audio[i]) + head for i in self.chosen]
        written: dict[int, str] = {}
        for batch in plan_batches(
            positions, self.options.max_new_tokens, 1, self.options.positions_per_batch
        ):
            indices = [self.chosen[at] for at in batch]
            audio = [self.reader.reader.read(examples.utterances[i]) for i in indices]
            answers = searcher.decode(audio, [int(examples.audio[i]) for i in indices])
            written |= dict(zip(indices, (a.text for a in answers), strict=True))
        rows = [
            Hypothesis(examples.utterances[i].key, examples.utterances[i].target, written[i])
            for i in self.chosen
        ]
        errors = score(rows)
        texts = [{"key": row.key, "reference": row.reference, "hypothesis": row.hypothesis} for row in rows]
        return Samples(errors.wer if errors.words else None, texts)
