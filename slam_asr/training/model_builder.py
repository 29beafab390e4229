"""Builds the batch readers and the model of a training job."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from slam_asr.artifacts.feature_store.reader import AudioReader, FeatureReader, StoreReader
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import read_rows
from slam_asr.config.recipe import Recipe, Training
from slam_asr.cores import usable_cores
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import (
    checkpoint_layers,
    llm_positions,
    llm_width,
    load_llm,
    load_tokenizer,
    set_tuning,
)
from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight, NotLazilyLoadable, describe_lazy_llm
from slam_asr.progress import log_line
from slam_asr.training.batches import BatchReader, Examples
from slam_asr.training.engines.choose import shards_weights
from slam_asr.training.initial_model import build_initial_projector, load_initial_adapter
from slam_asr.training.job import TrainingJob


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
    readers = {
        "train": BatchReader(
            Examples(utterances["train"], source, recipe.projector, prompt, prompt.for_training, limit),
            source,
            draw,
            threads,
        )
    }
    if "dev" in utterances:
        readers["dev"] = BatchReader(
            Examples(utterances["dev"], source, recipe.projector, prompt, [prompt.main], limit),
            source,
            threads=threads,
        )
    return readers


def _source(
    store: str | None, spec: EncoderSpec, recipe: Recipe, manifests: Iterable[Sequence[Utterance]]
) -> FeatureReader:
    """Return a reader of the feature store or, without a store, of the audio files."""
    if store is None:
        return AudioReader(spec, recipe.features)
    audio_ids = [u.audio_id for utterances in manifests for u in utterances]
    options = recipe.features
    return StoreReader(FeatureStore(store, spec.fingerprint(), options.dtype, audio_ids, options.cache_bytes))


def build_model(job: TrainingJob, recipe: Recipe, device: torch.device) -> tuple[Slam, list[LazyWeight]]:
    """Build the model with the LLM. Only trained weights require a gradient.

    Random initial weights depend only on the recipe's seed. If the engine shards the LLM, the LLM's weights
    are left on the meta device where possible, so that no process holds the complete LLM.

    Args:
        job: names the LLM's folder, the feature store, and the model to start from.
        recipe: the training run's recipe.
        device: where a frozen encoder is placed; the engine moves and casts the other parts.

    Returns:
        The model, and the weights of the LLM that are on the meta device, for the engine to read. The list is
        empty if the LLM is already loaded.

    Raises:
        UserError: weights cannot be used.
    """
    options = recipe.training
    spec = describe_encoder(recipe.encoder)
    llm, lazy_weights = _load_llm(Path(job.llm_folder), options, recipe.llm.trust_remote_code)
    set_tuning(llm, recipe.llm, options.seed)
    load_initial_adapter(job, llm)
    projector = build_initial_projector(job, recipe, spec.width, llm_width(llm))
    encoder = None
    if job.feature_store is None and recipe.encoder.tuning == "full":
        # A trained encoder is loaded on the CPU, because the engine moves it. A frozen encoder, below, is not
        # in the engine's care.
        encoder = spec.load(DTYPES[options.precision]).requires_grad_(True)
    elif job.feature_store is None:
        encoder = spec.load(DTYPES[encoder_precision(recipe.features.dtype, device.type == "cuda")], device)
    if options.gradient_checkpointing:
        checkpoint_layers(llm)
        if recipe.encoder.tuning == "full":
            # `Recipe.caches_features` is false for a trained encoder, so there is no feature store.
            assert encoder is not None
            checkpoint_layers(encoder)
    return Slam(projector, llm, encoder, recipe.features.dtype, recipe.projector.dropout), lazy_weights


def _load_llm(
    folder: Path, options: Training, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[LazyWeight]]:
    """Load the LLM; or leave its weights on the meta device, if the engine can read them one by one."""
    dtype = DTYPES[options.precision]
    if shards_weights(options):
        try:
            return describe_lazy_llm(folder, dtype, trust_remote_code)
        except NotLazilyLoadable as reason:
            if torch.distributed.get_rank() == 0:
                log_line(f"each process loads the complete LLM before it is sharded: {reason}")
    return load_llm(folder, dtype, trust_remote_code=trust_remote_code), []


def count_parameters(model: nn.Module, encoder: int) -> dict[str, tuple[int, int]]:
    """Count the parameters of each part of the model.

    Args:
        model: the model, before an engine shards it.
        encoder: number of the encoder's parameters, used if the encoder is not a child of the model.

    Returns:
        (all parameters, trained ones) of `projector`, `llm` and `encoder`. In the phase `beginning`, `head`
        takes the place of `llm`.
    """
    counts = {
        name: (
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in part.parameters() if p.requires_grad),
        )
        for name, part in model.named_children()
    }
    # A frozen encoder is not a child of the model (see `Slam`). With cached features, it is not even loaded.
    counts.setdefault("encoder", (encoder, 0))
    return counts
