"""Runs test utterances through a model, in batches that do not depend on the number of processes.

If there are several processes, usually one per GPU, each runs `python -m slam_asr.decoding.decoder JOB`. It
reads batches from standard input and writes answers to standard output, one JSON line each.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from slam_asr.artifacts.feature_store.reader import AudioReader
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import fit_to_window
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.cores import usable_cores
from slam_asr.decoding.journal import answers_in
from slam_asr.decoding.model import Model, open_model
from slam_asr.errors import InputError
from slam_asr.models.encoders.frontend import Prepared
from slam_asr.models.searcher import Answer, Searcher, plan_batches
from slam_asr.runtime.launch import Job, ProcessEnded, processes_of
from slam_asr.runtime.worker import failures_written_to


def _read_manifests(files: list[str]) -> list[Utterance]:
    """Read the utterances of several manifests.

    Raises:
        InputError: two manifests have the same utterance, which would count twice in every rate.
    """
    found: dict[tuple[str, str, str, float | None], tuple[Utterance, str]] = {}
    for file in files:
        for utterance in read_manifest(file):
            name = (utterance.key, utterance.subset, utterance.source, utterance.start)
            if name in found:
                raise InputError(
                    f"The utterance {utterance.key} is in {found[name][1]} and in {file}: give each once, "
                    "because it would count twice in the word error rate."
                )
            found[name] = utterance, file
    return [utterance for utterance, _ in found.values()]


class Decoder:
    """Decodes batches of the utterances in manifests.

    Weights are loaded by `load`, or with the first batch.

    Args:
        recipe: how to decode, and whether from cached features.
        model: a located model.
        files: paths of the manifests.
        feature_store: feature store that extract-features wrote; without one, audio is encoded on the fly.
        quiet: do not log how many utterances are too long, because the stage that started this process has
            already done so.
    """

    def __init__(
        self, recipe: Recipe, model: Model, files: list[str], feature_store: str | None, quiet: bool = False
    ) -> None:
        self.recipe, self.model, self.files = recipe, model, files
        in_manifests = _read_manifests(files)
        self.utterances = fit_to_window(in_manifests, model.spec, quiet)
        self.audio_ids = [u.audio_id for u in self.utterances]
        # The store has outputs of the frozen encoder. An encoder that was trained has other outputs.
        if model.trained.encoder.tuning == "full" or recipe.features.cache == "none":
            feature_store = None
        self.feature_store, self.store = feature_store, None
        self._prompt = model.prompt()
        if feature_store:
            dtype, limit = model.trained.features.dtype, recipe.features.cache_bytes
            self.store = FeatureStore(feature_store, model.config.encoder, dtype, self.audio_ids, limit)

    @cached_property
    def batches(self) -> list[list[int]]:
        """The indices in `utterances` of each batch.

        Raises:
            ConfigurationError: an utterance leaves too few LLM positions for its answer.
        """
        options = self.recipe.decoding
        limits = options.max_new_tokens, options.beams, options.positions_per_batch
        positions = [n + self._prompt.main.positions for n in self._audio_positions]
        self.model.require_capacity(positions, options, lambda i: f"Utterance {self.utterances[i].key}")
        return plan_batches(positions, *limits)

    def load(self) -> None:
        """Load the weights now, so that the first batch takes no longer than the others."""
        _ = self._searcher

    @cached_property
    def _searcher(self) -> Searcher:
        options = self.recipe.decoding
        return Searcher(self.model.load(options, with_encoder=self.store is None), self._prompt, options)

    def decode(self, batch: list[int]) -> dict[int, Answer]:
        """Decode the utterances with the given indices; return their answers by index."""
        read: Callable[[Utterance], torch.Tensor | Prepared] = self._reader.read
        inputs = list(self._read_pool.map(read, [self.utterances[i] for i in batch]))
        answers = self._searcher.decode(inputs, [self._audio_positions[i] for i in batch])
        return dict(zip(batch, answers, strict=True))

    @cached_property
    def _audio_positions(self) -> list[int]:
        """Number of LLM positions of each utterance's audio."""
        return [self.model.positions(self._reader.span(u)) for u in self.utterances]

    @cached_property
    def _reader(self) -> FeatureStore | AudioReader:
        return self.store or AudioReader(self.model.spec, self.model.trained.features)

    @cached_property
    def _read_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(usable_cores(), "read-audio")


@dataclass(kw_only=True)
class DecodingJob(Job):
    """The instructions for one of several processes."""

    recipe: str
    """The resolved recipe, as YAML."""
    model: str
    """The model's folder on local disk."""
    files: list[str]
    """Paths of the manifests."""
    feature_store: str | None
    """As for `Decoder`."""


def decode_on_several(
    decoder: Decoder, batches: list[list[int]], number: int, take: Callable[[dict[int, Answer]], None]
) -> None:
    """Decode batches on several processes; each gets its next batch when it has finished the previous one.

    Args:
        decoder: holds recipe, model and utterances; it decodes nothing itself.
        batches: indices of each batch's utterances.
        number: number of processes.
        take: receives each batch's answers; never called by two threads at once.

    Raises:
        UserError: a process failed; the message is that of the first one to fail. The others are terminated.
        ProcessFailure: a process's GPU failed, which is usually temporary.
    """
    remaining, lock = iter(batches), threading.Lock()
    job = DecodingJob(
        recipe=dump_recipe(decoder.recipe),
        model=str(decoder.model.folder),
        files=decoder.files,
        feature_store=decoder.feature_store,
    )
    remedy = "decoding.positions_per_batch or decoding.processes"
    # The pool is entered first, so it is left last: a thread that waits for an answer ends only when its
    # process is terminated.
    with (
        ThreadPoolExecutor(number, "give-batches") as pool,
        processes_of("slam_asr.decoding.decoder", job, number, remedy, piped=True) as running,
    ):
        futures = [pool.submit(_serve, process, remaining, take, lock) for process in running]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()


def _serve(
    process: subprocess.Popen[str],
    batches: Iterator[list[int]],
    take: Callable[[dict[int, Answer]], None],
    lock: threading.Lock,
) -> None:
    """Send batches to a process and pass its answers on, until no batch is left.

    Raises:
        ProcessEnded: the process ended early.
    """
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    while True:
        with lock:
            batch = next(batches, None)
        if batch is None:
            return
        try:
            process.stdin.write(json.dumps(batch) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        # A process that was killed leaves a broken pipe, or an empty or incomplete line. Waiting for it gives
        # its exit code, which `processes_of` reports.
        if not line.endswith("\n"):
            process.wait()
            raise ProcessEnded
        with lock:
            take(answers_in(json.loads(line)))


def main() -> None:
    """Run one of several processes: read batches from standard input, and write answers to standard output.

    Each line is JSON: one batch, or the answers to it.
    """
    job = DecodingJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    answer_stream = sys.stdout
    with (
        failures_written_to(Path(job.folder), "lower decoding.positions_per_batch"),
        # Standard output carries answers only: logs go to standard error.
        contextlib.redirect_stdout(sys.stderr),
    ):
        if torch.cuda.is_available():
            torch.cuda.set_device(job.process)
        recipe = load_recipe(job.recipe)
        decoder = Decoder(recipe, open_model(job.model, recipe), job.files, job.feature_store, quiet=True)
        for line in sys.stdin:
            answers = decoder.decode(json.loads(line))
            values = {index: asdict(answer) for index, answer in answers.items()}
            print(json.dumps(values), file=answer_stream, flush=True)


if __name__ == "__main__":
    main()
