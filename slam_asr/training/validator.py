"""Scores the dev set after a step, and transcribes a few of its utterances.

The loss shows that the model learns; transcripts show what it learns.
"""

import contextlib
import random
import signal
from dataclasses import dataclass, replace

import torch

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import measure
from slam_asr.config.recipe import Recipe
from slam_asr.models.ctc import CtcBatch
from slam_asr.models.searcher import Searcher, plan_batches
from slam_asr.models.slam import Slam
from slam_asr.training.batches import BatchReader
from slam_asr.training.builder import Parts
from slam_asr.training.ctc_model import CtcModel
from slam_asr.training.micro_batches import own_share, scores_of
from slam_asr.training.prefetch import prefetch


class StopRequest:
    """Remembers a signal. The loop checks for one after each step, and so does a validation after each batch.

    Kubernetes sends SIGTERM to a preempted pod and kills it after a grace period, by default 30 seconds. That
    is enough for a last checkpoint. A terminated run of Kubeflow Pipelines leaves only about one second.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the last signal, or None."""

    def listen(self) -> None:
        """Install the handlers: from now on a signal no longer ends this process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self.signal = number


@dataclass
class Samples:
    """The transcripts of one validation."""

    wer: float | None
    """Word error rate of the transcripts, as a fraction. None if `cer` is measured instead, or if the
    references contain no words."""
    texts: list[dict[str, str]]
    """`key`, `reference` and `hypothesis` of each utterance."""
    cer: float | None = None
    """Character error rate as a fraction, measured instead of `wer` if spaces do not separate words."""


class SampleTranscriber:
    """Transcribes the same dev utterances at each validation.

    All processes transcribe all of these utterances: gathering sharded weights is a collective operation, in
    which every process must take part equally often.

    Args:
        reader: batch reader of the dev set.
        recipe: sets the number of utterances and the options of decoding.
    """

    def __init__(self, reader: BatchReader, recipe: Recipe) -> None:
        self.reader, self.prompt = reader, reader.examples.recipe_prompts
        self.options = replace(recipe.decoding, beams=1, nbest=1)
        count = len(reader.examples)
        # The utterances are the same on every process, at every validation and after a restart, so that
        # transcripts of different steps can be compared.
        draw = random.Random(f"{recipe.training.seed}/samples")
        self.indices = sorted(draw.sample(range(count), min(recipe.training.samples, count)))

    def transcribe(self, model: Slam | CtcModel) -> Samples:
        """Transcribe the utterances: greedily with the LLM or, in the beginning, by CTC's best paths."""
        texts = self._spell(model) if isinstance(model, CtcModel) else self._search(model)
        examples = self.reader.examples
        rows = [
            Hypothesis(examples.utterances[i].key, examples.utterances[i].target, texts[i])
            for i in self.indices
        ]
        measured = measure(rows)
        errors = measured.total()
        rate = errors.wer if errors.words else None
        shown = [{"key": row.key, "reference": row.reference, "hypothesis": row.hypothesis} for row in rows]
        return Samples(None, shown, cer=rate) if measured.characters else Samples(rate, shown)

    @torch.no_grad()
    def _spell(self, model: CtcModel) -> dict[int, str]:
        """Return the text of CTC's best path for each utterance, keyed by the utterance's index."""
        vocabulary, texts = self.reader.vocabulary, {}
        assert vocabulary is not None, "the beginning has set it"
        device = model.head.embeddings.device
        for index in self.indices:
            batch = self.reader.batch([index])
            assert isinstance(batch, CtcBatch), "in the beginning, batches are without the LLM"
            texts[index] = vocabulary.text_of(model.spell(batch.to(device))[0])
        return texts

    def _search(self, model: Slam) -> dict[int, str]:
        """Return the LLM's answer for each utterance, keyed by the utterance's index."""
        examples = self.reader.examples
        searcher = Searcher(model, self.prompt, self.options, inference_only=False)
        prompt_positions = self.prompt.main.positions
        positions = [int(examples.audio_positions[i]) + prompt_positions for i in self.indices]
        texts_by_index: dict[int, str] = {}
        limit, budget = self.options.max_new_tokens, self.options.positions_per_batch
        for batch in plan_batches(positions, limit, 1, budget):
            indices = [self.indices[i] for i in batch]
            audio = [self.reader.reader.read(examples.utterances[i]) for i in indices]
            hypotheses = searcher.decode(audio, [int(examples.audio_positions[i]) for i in indices])
            texts_by_index |= dict(zip(indices, (h.text for h in hypotheses), strict=True))
        return texts_by_index


class Validator:
    """Validates the model between two steps. All processes must call each method together.

    Args:
        parts: the parts of the training run.
        stop: the stop request of this process, which ends a validation early.
    """

    def __init__(self, parts: Parts, stop: StopRequest) -> None:
        self.parts, self.stop = parts, stop
        transcribes = "dev" in parts.readers and parts.recipe.training.samples
        self.transcriber = SampleTranscriber(parts.readers["dev"], parts.recipe) if transcribes else None

    def validate(self) -> tuple[float, float, Samples | None] | None:
        """Score the dev set, and transcribe a few of its utterances.

        Returns:
            Mean loss and accuracy over the target tokens of the dev set; and the transcripts, or None if the
            training makes none. In the beginning, loss and accuracy are CTC's loss, and 1 minus the token
            error rate. Instead of all three, None if a process was asked to stop meanwhile.
        """
        module = self.parts.engine.module
        module.eval()
        try:
            scores = self._score()
            return None if scores is None else (*scores, self._transcribe())
        finally:
            module.train()

    @torch.no_grad()
    def _score(self) -> tuple[float, float] | None:
        reader, engine, device = self.parts.readers["dev"], self.parts.engine, self.parts.device
        mine = own_share(self.parts, list(range(len(reader.examples))), reader)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        # `own_share` gives all processes the same number of batches, so that all take part in the same
        # collective operations.
        for batch in prefetch(reader.batch(indices) for indices in mine):
            batch = batch.to(device)
            sums += scores_of(engine.module(batch), batch).sums
            if self._any_process_stops():
                return None
        torch.distributed.all_reduce(sums)
        loss, correct, targets = sums.tolist()
        return loss / targets, correct / targets

    def _transcribe(self) -> Samples | None:
        if self.transcriber is None:
            return None
        # Layers are compiled for complete utterances. Decoding takes one token at a time, and would compile
        # them again.
        compiles = self.parts.recipe.training.compile
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            return self.transcriber.transcribe(self.parts.engine.model)

    def _any_process_stops(self) -> bool:
        # Called after each batch, because all processes must leave the loop after the same batch. Otherwise,
        # some would wait for ever in the next collective operation.
        flag = torch.tensor([float(self.stop.signal is not None)], device=self.parts.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())
