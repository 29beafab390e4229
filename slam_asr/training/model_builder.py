"""Builds the model with the LLM, and the projector that a training run starts from."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from slam_asr.artifacts.model_folder import (
    ADAPTER,
    read_adapter,
    read_config,
    read_projector,
    replace_weights,
)
from slam_asr.config.recipe import Recipe, Training
from slam_asr.models.augmentation import Augmentation
from slam_asr.models.encoders.base import SpeechEncoder
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import checkpoint_layers, llm_width, load_llm, set_tuning
from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.models.projector import SpeechProjector, build_projector
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight, NotLazilyLoadable, describe_lazy_llm
from slam_asr.progress import log_line
from slam_asr.training.job import TrainingJob


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
    if options.gradient_checkpointing:
        checkpoint_layers(llm)
    if recipe.encoder.tuning == "frozen":
        encoder = load_frozen_encoder(job, recipe, device)
    else:
        # A trained encoder is loaded on the CPU, because the engine moves it. A frozen encoder is not in the
        # engine's care.
        encoder = spec.load(DTYPES[options.precision]).requires_grad_(True)
        if options.gradient_checkpointing:
            checkpoint_layers(encoder)
    augmentation = Augmentation(recipe.projector.dropout, recipe.projector.masks)
    return Slam(projector, llm, encoder, recipe.features.dtype, augmentation), lazy_weights


def load_frozen_encoder(job: TrainingJob, recipe: Recipe, device: torch.device) -> SpeechEncoder | None:
    """Load a frozen encoder on a device; return None if its features are cached.

    Raises:
        ModelError: weights are missing, damaged, or not finite.
    """
    if job.feature_store is not None:
        return None
    dtype = DTYPES[encoder_precision(recipe.features.dtype, device.type == "cuda")]
    return describe_encoder(recipe.encoder).load(dtype, device)


def build_initial_projector(
    job: TrainingJob, recipe: Recipe, encoder_width: int, width_of_llm: int
) -> SpeechProjector:
    """Build the projector that a training run starts from, in float32.

    Its weights are those of the job's initial model or, without one, drawn at random with the recipe's seed.
    """
    projector = build_projector(recipe.projector, encoder_width, width_of_llm, recipe.training.seed)
    if job.init_from:
        # Loading is strict: a missing weight raises an error, instead of leaving a part of the projector
        # random.
        projector.load_state_dict(read_projector(job.init_from, read_config(job.init_from)).state_dict())
    return projector


def load_initial_adapter(job: TrainingJob, llm: PreTrainedModel) -> None:
    """Load the initial model's adapter into an LLM with adapters, if the job starts from that adapter."""
    if job.init_from and "init_adapter" in job.inputs:
        # peft derives the names of an adapter's weights from the layer: `q_proj.lora_A.default.weight`.
        trained = [name for name, _ in llm.named_parameters() if ".lora_" in name]
        replace_weights(llm, read_adapter(job.init_from), str(Path(job.init_from) / ADAPTER), trained)


def _load_llm(
    folder: Path, options: Training, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[LazyWeight]]:
    """Load the LLM; or leave its weights on the meta device, if the engine can read them one by one."""
    dtype = DTYPES[options.precision]
    # These engines give each process a shard of the frozen weights instead of a full copy.
    if options.engine == "fsdp" or options.zero_stage == 3:
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
    counts = {}
    for name, part in model.named_children():
        sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
        counts[name] = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    # A frozen encoder is not a child of the model (see `Slam`). With cached features, it is not even loaded.
    counts.setdefault("encoder", (encoder, 0))
    return counts
