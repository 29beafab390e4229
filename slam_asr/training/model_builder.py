"""What a training works with: the model, and the batches that it is shown."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slam_asr.conversion.model import read_config, read_projector
from slam_asr.features.audio_source import fit_to_window
from slam_asr.features.reader import AudioReader, FeatureReader, StoreReader
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.models.encoder import EncoderSpec, describe_encoder
from slam_asr.models.llm import (
    checkpoint_layers,
    llm_positions,
    llm_width,
    load_llm,
    load_tokenizer,
    set_tuning,
)
from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.sharded import NotOneToOne, StoredWeight, describe_stored_llm
from slam_asr.models.slam import Slam
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe, Training
from slam_asr.training.batches import BatchReader, Examples
from slam_asr.training.engines.choose import spreads_weights
from slam_asr.training.job import TrainingJob


def build_prompt(job: TrainingJob, recipe: Recipe) -> Prompt:
    """The prompt as the LLM's tokenizer spells it."""
    return Prompt(load_tokenizer(Path(job.llm_folder)), recipe.llm)


def build_readers(job: TrainingJob, recipe: Recipe, prompt: Prompt, processes: int) -> dict[str, BatchReader]:
    """Batches of the sets `train` and, where there is one, `dev`."""
    spec = describe_encoder(recipe.encoder)
    manifests = {"train": job.train_manifest, **({"dev": job.dev_manifest} if job.dev_manifest else {})}
    utterances = {name: fit_to_window(read_manifest(path), spec) for name, path in manifests.items()}
    source = _source(job.feature_store, spec, recipe, utterances.values())
    limit = llm_positions(Path(job.llm_folder))
    threads = 1 if job.feature_store else max(1, len(os.sched_getaffinity(0)) // processes)
    draw = functools.partial(prompt.draw, recipe.training.seed)
    readers = {
        "train": BatchReader(
            Examples(utterances["train"], source, recipe.projector, prompt, prompt.drawn, limit),
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
    """The feature store, or the audio itself."""
    if store is None:
        return AudioReader(spec, recipe.features)
    wanted = [u.audio_id for utterances in manifests for u in utterances]
    cache = int(recipe.features.cache_gigabytes * 1e9)
    return StoreReader(FeatureStore(store, spec.fingerprint(), recipe.features.dtype, wanted, cache))


def build_model(job: TrainingJob, recipe: Recipe, device: torch.device) -> tuple[Slam, list[StoredWeight]]:
    """The model in the recipe's precision, with what is trained open to gradients; initial weights depend on the seed alone.

    Where the engine spreads an LLM over processes, none of them holds it whole.

    Returns:
        The model, and the LLM's weights that its engine has to read; none where they are there.
    """
    options = recipe.training
    spec = describe_encoder(recipe.encoder)
    llm, stored = _llm(Path(job.llm_folder), options)
    set_tuning(llm, recipe.llm, options.seed)
    projector = build_projector(recipe.projector, spec.width, llm_width(llm), options.seed)
    if job.init_from:
        projector.load_state_dict(read_projector(job.init_from, read_config(job.init_from)).state_dict())
    heard = None
    if job.feature_store is None and recipe.encoder.tuning == "full":
        heard = spec.load(DTYPES[options.precision]).requires_grad_(True)
    elif job.feature_store is None:
        heard = spec.load(DTYPES[encoder_precision(recipe.features.dtype, device.type == "cuda")], device)
    if options.gradient_checkpointing:
        checkpoint_layers(llm)
        if recipe.encoder.tuning == "full":
            checkpoint_layers(heard)
    return Slam(projector, llm, heard, recipe.features.dtype), stored


def _llm(folder: Path, options: Training) -> tuple[PreTrainedModel, list[StoredWeight]]:
    dtype = DTYPES[options.precision]
    if spreads_weights(options):
        try:
            return describe_stored_llm(folder, dtype)
        except NotOneToOne as reason:
            if torch.distributed.get_rank() == 0:
                log_line(f"the LLM is loaded whole by each process, before it is spread: {reason}")
    return load_llm(folder, dtype), []


def count_parameters(model: Slam, encoder: int) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of each part.

    Args:
        model: whole.
        encoder: parameters of an encoder that is not a part of it.
    """
    counts = {
        name: (
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in part.parameters() if p.requires_grad),
        )
        for name, part in model.named_children()
    }
    counts.setdefault("encoder", (encoder, 0))
    return counts
