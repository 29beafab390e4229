"""The model folder: `projector.safetensors` and `config.json`.

Enough to decode with nothing else but the two base models, which are named together with the
SHA-256 of their weights.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from slam_asr.errors import UserError
from slam_asr.models.projector import LinearProjector, build_projector
from slam_asr.recipe import Recipe, load_recipe
from slam_asr.storage import local_path, write_atomically, write_json

WEIGHTS = "projector.safetensors"
CONFIG = "config.json"
FORMAT = 1


@dataclass
class ModelConfig:
    """What `config.json` says."""

    recipe: str
    """The resolved recipe as YAML: encoder, LLM, projector, prompt, and how it was trained."""
    encoder: dict[str, Any]
    """Fingerprint of the encoder that the features came from: weights' sha256, preprocessing."""
    llm_sha256: str
    """Of the LLM's weights."""
    encoder_width: int
    llm_width: int
    training: dict[str, Any] = field(default_factory=dict)
    """What the report says about the training."""
    format: int = FORMAT

    @property
    def typed_recipe(self) -> Recipe:
        """The recipe, checked."""
        return load_recipe(self.recipe)


def write_model(folder: Path, weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Write a model folder; the configuration last, and until then there is none."""
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, save({name: t.float().contiguous() for name, t in weights.items()}))
    write_json(folder / CONFIG, vars(config))


def read_config(model: str | Path) -> ModelConfig:
    """A model's configuration.

    Raises:
        UserError: the folder is no model, or one of a newer format.
    """
    path = local_path(model) / CONFIG
    if not path.is_file():
        raise UserError(f"{model} holds no model (no {CONFIG}): give the folder that convert-checkpoint wrote.")
    try:
        values = json.loads(path.read_text())
        if values.get("format", 0) > FORMAT:
            raise UserError(f"{path} is of format {values['format']}, newer than this program reads: update slam-asr.")
        return ModelConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model's configuration: convert the checkpoint again.") from error


def read_projector(model: str | Path, config: ModelConfig) -> LinearProjector:
    """The trained projector in float32.

    Raises:
        UserError: the weights are missing, damaged, or of other widths than the configuration says.
    """
    path = local_path(model) / WEIGHTS
    projector = build_projector(config.typed_recipe.projector, config.encoder_width, config.llm_width)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: convert the checkpoint again.") from error
    expected = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != found:
        wrong = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        raise UserError(
            f"{path} does not fit its configuration (encoder width {config.encoder_width}, LLM width "
            f"{config.llm_width}): {', '.join(f'{n} is {found.get(n)}, not {expected.get(n)}' for n in wrong)}."
        )
    projector.load_state_dict(weights)
    return projector.eval().requires_grad_(False)
