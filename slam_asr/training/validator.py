"""Scores the dev set after a step, and transcribes a few of its utterances."""

import contextlib

import torch

from slam_asr.training.builder import Parts
from slam_asr.training.micro_batches import own_share, scores_of
from slam_asr.training.prefetch import prefetch
from slam_asr.training.samples import Samples
from slam_asr.training.stop_signals import StopRequest


class Validator:
    """Validates the model between two steps. All processes must call each method together.

    Args:
        parts: of the training.
        stop: ends a validation early.
    """

    def __init__(self, parts: Parts, stop: StopRequest) -> None:
        self.parts, self.stop = parts, stop

    @torch.no_grad()
    def validate(self) -> tuple[float, float] | None:
        """Score the dev set.

        Returns:
            Mean loss and accuracy over its target tokens; None if a process was asked to stop meanwhile.
        """
        reader, engine, device = self.parts.readers["dev"], self.parts.engine, self.parts.device
        mine = own_share(self.parts, list(range(len(reader.examples))), reader)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        engine.module.eval()
        try:
            for batch in prefetch(reader.batch(indices) for indices in mine):
                batch = batch.to(device)
                sums += scores_of(engine.module(batch), batch).sums
                if self._any_process_stops():
                    return None
        finally:
            engine.module.train()
        torch.distributed.all_reduce(sums)
        loss, correct, targets = sums.tolist()
        return loss / targets, correct / targets

    def transcribe(self) -> Samples | None:
        """Transcribe a few dev utterances; None if the training transcribes none."""
        engine, transcriber = self.parts.engine, self.parts.sample_transcriber
        if transcriber is None:
            return None
        engine.module.eval()
        # Layers are compiled for complete utterances. Decoding takes one token at a time, and would compile
        # them again.
        compiles = self.parts.recipe.training.compile
        uncompiled = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
        try:
            with uncompiled:
                return transcriber.transcribe(engine.model)
        finally:
            engine.module.train()

    def _any_process_stops(self) -> bool:
        # Asked after each batch: all processes must leave the loop after the same one.
        flag = torch.tensor([float(self.stop.signal is not None)], device=self.parts.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())
