"""The weights of a checkpoint, divided by the part of the model that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slam_asr.artifacts.model_folder import projector_from_weights, require_matching_weights
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.sources import Content
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import add_lora, describe_llm, llm_width
from slam_asr.models.projector import SpeechProjector
from slam_asr.pretrained.lazy_tensors import LazyTensors, rename_tensors
from slam_asr.pretrained.locate import locate_model


@dataclass
class Parts:
    """The weights of a checkpoint, divided by part and checked as `divide` describes."""

    content: Content
    projector: SpeechProjector
    """In float32."""
    llm: Mapping[str, torch.Tensor]
    """Empty if the LLM was not trained."""
    encoder: Mapping[str, torch.Tensor]
    """Keyed by name in the model that `EncoderSpec.encoder_of` returns. Empty if the encoder was not
    trained."""
    widths: tuple[int, int]
    """Number of values per encoder frame and per LLM position."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the training."""
        return self.content.recipe

    @property
    def where(self) -> str:
        """Path of the checkpoint, for messages."""
        return self.content.where

    @property
    def adapter(self) -> Mapping[str, torch.Tensor]:
        """The LoRA adapter's weights; empty without LoRA."""
        return self.llm if self.recipe.llm.tuning == "lora" else {}


def divide(content: Content) -> Parts:
    """Divide the weights by part, and check that projector and LoRA adapter fit encoder, LLM and recipe.

    The weights of a fully trained encoder or LLM are not checked here, but when they are written.

    Raises:
        ModelError: the checkpoint has no projector, or weights that do not fit.
        ConfigurationError: the recipe is not that of the training.
    """
    recipe, where = content.recipe, content.where
    tensors = by_part(content.weights)
    if not tensors["projector"]:
        raise ModelError(f"{where} holds no projector: it is not a checkpoint of slam-asr train.")
    llm = describe_llm(locate_model(recipe.llm.name), recipe.llm.trust_remote_code)
    widths = describe_encoder(recipe.encoder).width, llm_width(llm)
    projector = projector_from_weights(tensors["projector"], recipe.projector, *widths, where)
    parts = Parts(content, projector, tensors["llm"], tensors["encoder"], widths)
    if bool(parts.adapter) != any(".lora_" in name for name in parts.llm):
        raise ConfigurationError(
            f"{where} and the recipe {recipe.name}, whose llm.tuning is {recipe.llm.tuning}, do not agree on "
            "whether the LLM has a LoRA adapter: give the recipe of the training."
        )
    if parts.adapter:
        add_lora(llm, recipe.llm.lora, seed=0)
        names = [name for name, _ in llm.named_parameters() if ".lora_" in name]
        require_matching_weights(llm, parts.adapter, where, names)
    return parts


def by_part(weights: Mapping[str, torch.Tensor]) -> dict[str, LazyTensors]:
    """Divide weights by the part that their names begin with, and remove it from the names.

    Returns:
        The weights of `projector`, `llm` and `encoder`. Weights of any other part are left out.
    """
    names: dict[str, dict[str, str]] = {"projector": {}, "llm": {}, "encoder": {}}
    for name in weights:
        part, _, rest = name.partition(".")
        if part in names:
            # `SpeechEncoder` has the encoder in its attribute `model`.
            names[part][rest.removeprefix("model.") if part == "encoder" else rest] = name
    return {part: rename_tensors(weights, own) for part, own in names.items()}
