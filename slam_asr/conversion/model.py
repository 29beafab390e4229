"""The model folder: `projector.safetensors`, `config.json`, and what else was trained.

Enough to decode with nothing else but the two base models, which are named together with the
SHA-256 of their weights. Where the recipe trained more than the projector, the folder holds it in
the field's own formats: `adapter/` as peft writes it, `llm/` and `encoder/` as transformers does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from slam_asr.conversion.shipped import fetch_model
from slam_asr.errors import UserError
from slam_asr.models.pickles import read_pickle
from slam_asr.models.projector import SpeechProjector, build_projector
from slam_asr.models.tensors import is_finite
from slam_asr.recipe import Encoder, Projector, Recipe, load_recipe
from slam_asr.storage import local_path, sha256_of_file, write_atomically, write_json

WEIGHTS = "projector.safetensors"
CONFIG = "config.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
LLM, ENCODER = "llm", "encoder"
FORMAT = 2
"""1 knew the linear projector alone, and is read as it is."""

_PEFT = "base_model.model."
"""In front of every name in an adapter's file."""


@dataclass
class ModelConfig:
    """What `config.json` says."""

    recipe: str
    """The resolved recipe as YAML: encoder, LLM, projector, prompt, and how it was trained."""
    encoder: dict[str, Any]
    """Fingerprint of the base encoder: weights' sha256, preprocessing."""
    llm_sha256: str
    """Of the base LLM's weights."""
    encoder_width: int
    llm_width: int
    training: dict[str, Any] = field(default_factory=dict)
    """What the report says about the training."""
    format: int = FORMAT

    @property
    def typed_recipe(self) -> Recipe:
        """The recipe, checked."""
        return load_recipe(self.recipe)


def write_model(
    folder: Path, projector: Mapping[str, torch.Tensor], config: ModelConfig, half: bool = False
) -> None:
    """Write a model's projector, in fp16 or fp32, and configuration; the configuration last, and until then there is none."""
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(
        folder / WEIGHTS,
        save(
            {
                name: t.to(torch.float16 if half else torch.float32).contiguous()
                for name, t in projector.items()
            }
        ),
    )
    write_json(folder / CONFIG, vars(config))


def read_config(model: str | Path) -> ModelConfig:
    """A model's configuration.

    Raises:
        UserError: the folder is no model, or one of a newer format.
    """
    path = fetch_model(model) / CONFIG
    if not path.is_file():
        raise UserError(
            f"{model} holds no model (no {CONFIG}): give the folder that convert-checkpoint wrote."
        )
    try:
        values = json.loads(path.read_text())
        if values.get("format", 0) > FORMAT:
            raise UserError(
                f"{path} is of format {values['format']}, newer than this program reads: update slam-asr."
            )
        return ModelConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model's configuration: convert the checkpoint again.") from error


def model_digests(model: str | Path) -> dict[str, str]:
    """The SHA-256 of every file of a model that decides what it says."""
    folder = local_path(model)
    files = [folder / CONFIG, folder / WEIGHTS]
    files += [
        f
        for part in (ADAPTER, LLM, ENCODER)
        for f in sorted((folder / part).glob("*"))
        if f.suffix in (".json", ".safetensors")
    ]
    return {str(f.relative_to(folder)): sha256_of_file(f) for f in files if not f.name.startswith(".")}


def encoder_of(model: str | Path, base: Encoder) -> Encoder:
    """The section that names the model's own encoder, if it has one, else the base model."""
    own = local_path(model) / ENCODER
    return replace(base, name=str(own)) if own.is_dir() else base


def read_projector(model: str | Path, config: ModelConfig) -> SpeechProjector:
    """The trained projector in float32.

    Raises:
        UserError: the weights are missing, damaged, not finite, or of other widths than the configuration says.
    """
    path = local_path(model) / WEIGHTS
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: convert the checkpoint again.") from error
    return projector_from_weights(
        weights, config.typed_recipe.projector, config.encoder_width, config.llm_width, str(path)
    )


def projector_from_weights(
    weights: Mapping[str, torch.Tensor], options: Projector, encoder_width: int, llm_width: int, where: str
) -> SpeechProjector:
    """A frozen projector with the given weights.

    Raises:
        UserError: they are not finite, or do not fit an encoder and an LLM of these widths.
    """
    with torch.device("meta"):
        projector = build_projector(options, encoder_width, llm_width)
    expected = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != found:
        wrong = [n for n in expected | found if expected.get(n) != found.get(n)]
        name = wrong[0]
        raise UserError(
            f"{where} does not fit a {options.kind} projector with k = {options.downsampling} from encoder width {encoder_width} "
            f"to LLM width {llm_width}: {name} is {found.get(name, 'missing')}, not {expected.get(name, 'expected')}"
            f"{f', and {len(wrong) - 1} more differ' * (len(wrong) > 1)}. Name the encoder, LLM and projector that it was trained with."
        )
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise UserError(
                f"{where}: {name} holds values that are not finite; the training diverged. Take an earlier checkpoint."
            )
    projector.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return projector.eval().requires_grad_(False)


def write_adapter(folder: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    """Write a LoRA adapter as peft does.

    Args:
        folder: the model's; the adapter goes below it.
        weights: by their names in the LLM, `…q_proj.lora_A.default.weight`.
        recipe: rank, alpha, targets, and the LLM's name.
    """
    from slam_asr.models.llm import lora_config

    config = lora_config(recipe.llm.lora)
    config.base_model_name_or_path, config.task_type, config.inference_mode = (
        recipe.llm.name,
        "CAUSAL_LM",
        True,
    )
    tensors = {_PEFT + n.replace(".default.", "."): t.float().contiguous() for n, t in weights.items()}
    (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder / ADAPTER)
    write_atomically(folder / ADAPTER / ADAPTER_WEIGHTS, save(tensors))


def read_adapter(model: str | Path) -> dict[str, torch.Tensor]:
    """The adapter's weights by their names in the LLM; none where the model has no adapter.

    Raises:
        UserError: its file is damaged or missing.
    """
    folder = local_path(model) / ADAPTER
    return read_peft(folder) if folder.is_dir() else {}


def adapter_file(folder: Path) -> Path:
    """The file of weights of a folder that peft wrote.

    Raises:
        UserError: there is none.
    """
    for name in (ADAPTER_WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} holds no LoRA adapter (no {ADAPTER_WEIGHTS}, no adapter_model.bin): give the folder that peft wrote."
    )


def read_peft(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder that peft wrote, by their names in the LLM.

    Raises:
        UserError: its file is damaged or missing.
    """
    file = adapter_file(folder)
    if file.suffix == ".bin":
        weights = read_pickle(file)
    else:
        try:
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} cannot be read: copy it again, or convert the checkpoint again."
            ) from error
    return {_with_adapter_name(n.removeprefix(_PEFT)): t for n, t in weights.items()}


def _with_adapter_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.default.{last}"


def require_matching_weights(
    module: nn.Module, weights: Mapping[str, torch.Tensor], where: str, trained: list[str]
) -> None:
    """Compare weights with the module that they are for; it may be on the meta device.

    Args:
        module: with the names that `weights` has.
        weights: new values.
        where: to name in a complaint.
        trained: names that must all be there.

    Raises:
        UserError: a weight is missing, unknown, of another shape, or not finite.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    missing = [n for n in trained if n not in weights]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} weights, such as {missing[0]}: it belongs to another recipe."
        )
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "not there"
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)}, but in this LLM or encoder {shape}: it belongs to another model."
            )
        if not is_finite(tensor):
            raise UserError(
                f"{where}: {name} holds values that are not finite; the training diverged. Take an earlier checkpoint."
            )


def replace_weights(
    module: nn.Module, weights: Mapping[str, torch.Tensor], where: str, trained: list[str]
) -> None:
    """Replace some of a module's weights, after `require_matching_weights`.

    Raises:
        UserError: they do not fit.
    """
    require_matching_weights(module, weights, where, trained)
    module.load_state_dict(weights, strict=False)
