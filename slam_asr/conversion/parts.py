"""The weights of a checkpoint, divided by the part of the model that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slam_asr.artifacts.model_folder import projector_from_weights
from slam_asr.config.recipe import Recipe
from slam_asr.conversion.sources import Content
from slam_asr.conversion.tuned import check_adapter
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import describe_llm, llm_width
from slam_asr.pretrained.lazy_tensors import rename_tensors
from slam_asr.pretrained.locate import locate_model


@dataclass
class Parts:
    """The weights of a checkpoint, divided by part and checked as `divide` describes."""

    content: Content
    projector: Mapping[str, torch.Tensor]
    llm: Mapping[str, torch.Tensor]
    """Empty if the LLM was not trained."""
    encoder: Mapping[str, torch.Tensor]
    """Empty if the encoder was not trained."""
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
    names: dict[str, dict[str, str]] = {"projector": {}, "llm": {}, "encoder": {}}
    for name in content.weights:
        part, _, rest = name.partition(".")
        if part in names:  # weights of any other part are ignored
            names[part][rest] = name
    tensors = {part: rename_tensors(content.weights, own) for part, own in names.items()}
    if not tensors["projector"]:
        raise ModelError(f"{where} holds no projector: it is not a checkpoint of slam-asr train.")
    llm = describe_llm(locate_model(recipe.llm.name), recipe.llm.trust_remote_code)
    widths = describe_encoder(recipe.encoder).width, llm_width(llm)
    projector_from_weights(tensors["projector"], recipe.projector, *widths, where)
    parts = Parts(content, **tensors, widths=widths)
    if bool(parts.adapter) != any(".lora_" in name for name in parts.llm):
        raise ConfigurationError(
            f"{where} and the recipe {recipe.name}, whose llm.tuning is {recipe.llm.tuning}, do not agree on "
            "whether the LLM has a LoRA adapter: give the recipe of the training."
        )
    if parts.adapter:
        check_adapter(parts.adapter, recipe, where)
    return parts
