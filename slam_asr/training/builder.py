"""Builds the parts of a training run that its two phases share: device, data and plan."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slam_asr.artifacts.checkpoint import BEGINNING
from slam_asr.artifacts.feature_store.reader import AudioReader, FeatureReader
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import read_rows
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.cores import usable_cores
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import llm_positions, load_tokenizer
from slam_asr.models.precision import pick_device
from slam_asr.models.prompt import Prompt
from slam_asr.training.batches import BatchReader, Examples
from slam_asr.training.engines.choose import start_process_group
from slam_asr.training.engines.engine import Engine
from slam_asr.training.job import TrainingJob
from slam_asr.training.step_plan import Budget, TrainingPlan, budget_for


@dataclass
class Phase:
    """One of the two phases of a training run, with the parts that the phases do not share."""

    name: str
    """`BEGINNING` or `MAIN`."""
    engine: Engine
    parameters: dict[str, tuple[int, int]]
    """(all, trained) numbers of parameters of each part of the model; see `count_parameters`."""
    packs: bool
    """Whether the utterances of a batch are packed into one row."""
    rate: Callable[[int], float]
    """Function from step to learning rate. Steps are numbered from 1 over both phases."""
    operations_per_position: float
    """Floating-point operations per LLM position."""


@dataclass
class Parts:
    """The parts of a training run in one of its processes."""

    job: TrainingJob
    recipe: Recipe
    device: torch.device
    rank: int
    """Number of this process among the processes of all machines, from 0."""
    processes: int
    """Number of processes on all machines."""
    readers: dict[str, BatchReader]
    """Batch readers of the sets `train` and, if the job has one, `dev`."""
    budget: Budget
    plan: TrainingPlan
    phase: Phase = field(init=False)
    """The phase that the training is in; `slam_asr.training.phases` sets it."""

    @property
    def folder(self) -> Path:
        """Local folder for results."""
        return Path(self.job.folder)

    @property
    def engine(self) -> Engine:
        """Engine of the current phase."""
        return self.phase.engine

    @property
    def in_beginning(self) -> bool:
        """Whether the training is in its beginning."""
        return self.phase.name == BEGINNING

    @property
    def last_step(self) -> int:
        """Last step of the current phase."""
        return self.plan.beginning if self.in_beginning else self.plan.steps

    def distance_weight(self, step: int) -> float:
        """Return the weight of the distance loss in a step of the beginning.

        The weight grows linearly from 0. In early steps, the expected embeddings are often those of wrong
        tokens, and an output that is drawn to a wrong token stays there.
        """
        options = self.recipe.projector.beginning
        return options.distance_weight * step / options.steps


def build_parts(job: TrainingJob) -> Parts:
    """Join the process group, read the data, and plan the steps.

    The model is not built here, but at the start of each phase.

    Raises:
        UserError: a manifest or the feature store cannot be read, or an utterance does not fit the LLM.
    """
    recipe = load_recipe(job.recipe)
    options, beginning = recipe.training, recipe.projector.beginning
    device = _join_processes(options.engine)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # torchrun sets LOCAL_WORLD_SIZE to the number of processes on this machine. Only these share its cores.
    readers = build_readers(job, recipe, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    budget = budget_for(options, processes)
    plan = TrainingPlan(
        readers["train"].examples,
        budget,
        recipe.features.window_shards,
        options.seed,
        options.epochs,
        options.max_steps,
        beginning.steps if beginning.active else 0,
    )
    return Parts(job, recipe, device, rank, processes, readers, budget, plan)


def _join_processes(engine: str) -> torch.device:
    """Select this process's device, and join the process group."""
    device = pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        # NCCL's barrier and `torch.cuda.get_rng_state`, for example, use the current device. Without this
        # call, it would be the first GPU in all processes.
        torch.cuda.set_device(device)
    start_process_group(device, engine)
    return device


def build_readers(job: TrainingJob, recipe: Recipe, processes: int) -> dict[str, BatchReader]:
    """Create the batch readers of the sets `train` and, if the job has one, `dev`.

    In each epoch, one of the recipe's prompts is drawn for each train utterance. Dev utterances always get
    the main prompt.

    Args:
        job: names the manifests, the feature store and the LLM's folder.
        recipe: the training run's recipe.
        processes: number of processes on this machine, which share its CPU cores to decode audio.

    Raises:
        UserError: a manifest or the feature store cannot be read, or an utterance does not fit the LLM.
    """
    spec, trust = describe_encoder(recipe.encoder), recipe.llm.trust_remote_code
    prompt = Prompt(load_tokenizer(Path(job.llm_folder), trust), recipe.llm)
    manifests = {"train": job.train_manifest, **({"dev": job.dev_manifest} if job.dev_manifest else {})}
    utterances = {name: read_rows(read_manifest(path), job.rows[name]) for name, path in manifests.items()}
    source = _source(job.feature_store, spec, recipe, utterances.values())
    limit = llm_positions(Path(job.llm_folder), trust)
    # Cached features are memory-mapped, so one thread suffices. To decode audio, each process uses as many
    # threads as it has cores.
    threads = 1 if job.feature_store else max(1, usable_cores() // processes)
    draw = functools.partial(prompt.draw, recipe.training.seed)
    readers = {}
    for name, chosen in utterances.items():
        prompts = prompt.for_training if name == "train" else [prompt.main]
        examples = Examples(chosen, source, recipe.projector, prompt, prompts, limit)
        readers[name] = BatchReader(examples, source, draw, threads)
    return readers


def _source(
    store: str | None, spec: EncoderSpec, recipe: Recipe, manifests: Iterable[Sequence[Utterance]]
) -> FeatureReader:
    """Return a reader of the feature store or, without a store, of the audio files."""
    if store is None:
        return AudioReader(spec, recipe.features)
    audio_ids = [u.audio_id for utterances in manifests for u in utterances]
    options = recipe.features
    return FeatureStore(store, spec.fingerprint(), options.dtype, audio_ids, options.cache_bytes)
