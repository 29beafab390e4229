"""Checks and loads the model that a training run starts from, which `projector.init_from` names."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slam_asr.artifacts.model_folder import (
    ADAPTER,
    WEIGHTS,
    fetch_model,
    projector_from_weights,
    read_adapter,
    read_config,
    read_projector,
    replace_weights,
)
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.llm import describe_llm, llm_width
from slam_asr.models.projector import SpeechProjector, build_projector
from slam_asr.progress import log_line
from slam_asr.storage import join
from slam_asr.training.job import TrainingJob


def initial_projector(
    recipe: Recipe, encoder: EncoderSpec, llm_folder: Path, base: dict[str, Any]
) -> Path | None:
    """Fetch the model that `projector.init_from` names, and check that its projector fits.

    A warning is logged if the projector was trained with another encoder or LLM.

    Args:
        recipe: the training run's recipe; names the model.
        encoder: encoder of this training run.
        llm_folder: folder of this training run's LLM.
        base: `encoder_fingerprint` and `llm_sha256` of this training run.

    Returns:
        The model's local folder; None if `projector.init_from` is empty.

    Raises:
        UserError: the model does not exist, or its projector has another kind or size than the recipe's.
    """
    name = recipe.projector.init_from
    if not name:
        return None
    folder = fetch_model(name)
    config = read_config(folder)
    weights = read_projector(folder, config).state_dict()
    # Called only for its checks: each training process builds the projector itself.
    projector_from_weights(
        weights,
        recipe.projector,
        encoder.width,
        llm_width(describe_llm(llm_folder, recipe.llm.trust_remote_code)),
        f"projector.init_from: {join(folder, WEIGHTS)}",
    )
    others = [
        part
        for part, here, there in (
            ("encoder", base["encoder_fingerprint"], config.encoder),
            ("LLM", base["llm_sha256"], config.llm_sha256),
        )
        if here != there
    ]
    if others:
        log_line(
            f"warning: the projector of {name} was trained with another {' and '.join(others)}: it may be "
            "of little use as a starting point"
        )
    return folder


def starts_from_adapter(recipe: Recipe, folder: Path) -> bool:
    """Return whether a training run also starts from the adapter of the model in `projector.init_from`.

    A warning is logged if the model has an adapter but the recipe trains none.

    Args:
        recipe: the training run's recipe.
        folder: the model's local folder.

    Raises:
        ConfigurationError: the model has an adapter of another size or scale, or on other layers.
    """
    if not (folder / ADAPTER).is_dir():
        return False
    name = recipe.projector.init_from
    if recipe.llm.tuning != "lora":
        log_line(
            f"warning: {name} was trained with a LoRA adapter, which is left out here: set llm.tuning to "
            "lora to start from it too"
        )
        return False
    ours, theirs = recipe.llm.lora, read_config(folder).typed_recipe.llm.lora
    needed = [
        f"llm.lora.{key} to {value}"
        for key, value in (
            ("rank", theirs.rank),
            ("alpha", theirs.alpha),
            ("targets", f"[{', '.join(theirs.targets)}]"),
        )
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if needed:
        raise ConfigurationError(
            f"projector.init_from: the LoRA adapter of {name} does not fit the recipe's: set "
            f"{', '.join(needed)}."
        )
    return True


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
    if job.init_from and job.init_adapter:
        # peft derives the names of an adapter's weights from the layer: `q_proj.lora_A.default.weight`.
        trained = [name for name, _ in llm.named_parameters() if ".lora_" in name]
        replace_weights(llm, read_adapter(job.init_from), str(Path(job.init_from) / ADAPTER), trained)
