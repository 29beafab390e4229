"""Test utterances on their way through a model, in batches that do not depend on who decodes which.

On a machine with several GPUs each has a process that is given batches: `python -m slam_asr.decoding.decoder JOB`.
"""

import contextlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.decoding.launch import DecodingJob
from slam_asr.decoding.model import Model, open_model, require_room
from slam_asr.features.audio_source import fit_to_window
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import read_manifest
from slam_asr.processes import die_with_parent, failures_written_to
from slam_asr.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from slam_asr.features.reader import AudioReader, StoreReader
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.search import Answer, Searcher


class Decoder:
    """Weights are loaded by `load`, or when the first batch comes.

    Args:
        recipe: how to decode, and whether from stored features.
        model: that is to listen.
        files: manifests.
        feature_store: written by extract-features; without it, audio is encoded on the way.
    """

    def __init__(self, recipe: Recipe, model: Model, files: list[str], feature_store: str | None) -> None:
        self.recipe, self.model, self.files = recipe, model, files
        self.utterances = fit_to_window([u for file in files for u in read_manifest(file)], model.spec)
        self.addresses = [u.audio_id for u in self.utterances]
        if model.trained.encoder.tuning == "full" or recipe.features.cache == "none":
            feature_store = None
        self.feature_store = feature_store
        self._searcher: Searcher | None = None
        self.store = (
            FeatureStore(feature_store, model.config.encoder, model.trained.features.dtype, self.addresses)
            if feature_store
            else None
        )

    @cached_property
    def batches(self) -> list[list[int]]:
        """All utterances, by their numbers.

        Raises:
            UserError: one is so long that its answer would not fit behind it.
        """
        from slam_asr.models.search import plan_batches

        options = self.recipe.decoding
        head = len(self._prompt.main.before) + len(self._prompt.main.ids)
        positions = [n + head for n in self._audio]
        require_room(
            positions,
            lambda at: f"Utterance {self.utterances[at].key}",
            options.max_new_tokens,
            self.model.llm_folder,
        )
        return list(
            plan_batches(positions, options.max_new_tokens, options.beams, options.positions_per_batch)
        )

    def load(self) -> None:
        """Load the weights, so that the first batch takes no longer than others."""
        from slam_asr.models.search import Searcher

        self._searcher = Searcher(
            self.model.load(self.recipe.decoding, with_encoder=self.store is None),
            self._prompt,
            self.recipe.decoding,
        )

    def decode(self, batch: list[int]) -> "dict[int, Answer]":
        """The answers to a batch, by the utterances' numbers."""
        if self._searcher is None:
            self.load()
        inputs = list(self._reading.map(self._reader.read, [self.utterances[i] for i in batch]))
        return dict(zip(batch, self._searcher.decode(inputs, [self._audio[i] for i in batch]), strict=True))

    @cached_property
    def _audio(self) -> list[int]:
        """LLM positions of each utterance's audio."""
        return [self.model.positions(self._reader.span(u)) for u in self.utterances]

    @cached_property
    def _prompt(self) -> "Prompt":
        return self.model.prompt()

    @cached_property
    def _reader(self) -> "StoreReader | AudioReader":
        from slam_asr.features.reader import AudioReader, StoreReader

        return (
            StoreReader(self.store)
            if self.store
            else AudioReader(self.model.spec, self.model.trained.features)
        )

    @cached_property
    def _reading(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "read-audio")


def main() -> None:
    """Entry point of one process of several on a machine: batches come in a line each, and their answers go out so."""
    import torch

    die_with_parent()
    job = DecodingJob(**json.loads(Path(sys.argv[1]).read_text()))
    answers = sys.stdout
    with (
        failures_written_to(Path(job.folder), "decoding.positions_per_batch"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        if torch.cuda.is_available():
            torch.cuda.set_device(job.process)
        decoder = Decoder(load_recipe(job.recipe), open_model(job.model), job.files, job.feature_store)
        for line in sys.stdin:
            found = decoder.decode(json.loads(line))
            print(json.dumps({at: asdict(answer) for at, answer in found.items()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
