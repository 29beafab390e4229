"""The model folder: `projector.safetensors`, `config.json`, and all other trained weights.

Decoding needs only this folder and the two base models. config.json names the base models, together with the
SHA-256 of their weights. Weights that the recipe trained besides the projector are in the folder in common
formats: `adapter/` as peft writes it, and `llm/` and `encoder/` as transformers writes them.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slam_asr.config.recipe import Projector, Recipe, load_recipe
from slam_asr.errors import ModelError
from slam_asr.storage import fetch_folder, is_s3, local_path, sha256_of_file, write_atomically, write_json

# Only the functions that handle weights import torch, which takes seconds: `score` and the command line read
# only config.json.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from slam_asr.models.projector import SpeechProjector

WEIGHTS = "projector.safetensors"
CONFIG = "config.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
LLM, ENCODER = "llm", "encoder"
FORMAT = 2
"""Version of config.json. Version 1 supported only the linear projector, and can still be read."""

_PEFT = "base_model.model."
"""Prefix of every name in an adapter's file."""

CTC_HEAD = "ctc_head"
"""Key of the CTC head in `ModelConfig.training`. Its value has `tokens`, the ids of the tokens that CTC
distinguishes, with the blank's first; and `sharpness`, the factor of the head's scores."""
SHIPPED = Path(__file__).parents[1] / "projectors"
"""Trained projectors that come with the package, each a model folder with its model card (README.md)."""


@dataclass
class ModelConfig:
    """The content of `config.json`."""

    recipe: str
    """The resolved recipe as YAML: encoder, LLM, projector, prompt, and the settings of the training."""
    encoder: dict[str, Any]
    """Fingerprint of the base encoder: the digest of its weights, and its preprocessing."""
    llm_sha256: str
    """Digest of the base LLM's weights, from `weights_sha256`."""
    encoder_width: int
    """Values per encoder frame."""
    llm_width: int
    """Values per LLM position."""
    training: dict[str, Any] = field(default_factory=dict)
    """Facts about the training, for reports; and, under `CTC_HEAD`, the CTC head that decoding may use."""
    format: int = FORMAT
    """Version of this content; see `FORMAT`."""

    @property
    def typed_recipe(self) -> Recipe:
        """The parsed and validated recipe."""
        return load_recipe(self.recipe)


def write_model(
    folder: Path, projector: Mapping[str, "torch.Tensor"], config: ModelConfig, half: bool = False
) -> None:
    """Write a model's projector and configuration.

    The configuration is written last, so a folder in which writing was interrupted is not a model.

    Args:
        folder: the model's folder.
        projector: the projector's weights on the CPU, keyed by name in `SpeechProjector`, of any dtype.
        config: the content of config.json.
        half: whether to save the projector in bf16 instead of fp32.
    """
    # If the writing is interrupted, an old configuration must not remain next to new weights.
    (folder / CONFIG).unlink(missing_ok=True)
    _save(folder / WEIGHTS, projector, half)
    write_json(folder / CONFIG, vars(config))


def _save(path: Path, weights: Mapping[str, "torch.Tensor"], half: bool) -> None:
    """Write a safetensors file in bf16, if `half` is true, or else in fp32."""
    import torch
    from safetensors.torch import save

    dtype = torch.bfloat16 if half else torch.float32
    write_atomically(path, save({name: t.to(dtype).contiguous() for name, t in weights.items()}))


def read_config(model: str | Path) -> ModelConfig:
    """Read a model's configuration.

    Args:
        model: a model's folder or s3:// prefix, or the name of a shipped model.

    Raises:
        ModelError: the folder is not a model, or has a newer format.
        StorageError: the prefix holds no objects, or cannot be read.
    """
    path = fetch_model(model) / CONFIG
    if not path.is_file():
        if not is_s3(model) and not local_path(model).exists():
            raise ModelError(
                f"There is no model {model}: name a folder that convert-checkpoint wrote, or a shipped model "
                f"({', '.join(shipped_models())})."
            )
        raise ModelError(
            f"{model} holds no model (no {CONFIG}): give the folder that convert-checkpoint wrote."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format", 0) > FORMAT:
            raise ModelError(
                f"{path} has format {values['format']}, which is newer than this program: update slam-asr."
            )
        return ModelConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a model's configuration: convert the checkpoint again.") from error


def model_digests(model: str | Path) -> dict[str, str]:
    """Compute the SHA-256 of each file that affects a model's output, keyed by path in its local folder."""
    folder = local_path(model)
    parts = [f for part in (ADAPTER, LLM, ENCODER) for f in sorted((folder / part).glob("*"))]
    files = [folder / CONFIG, folder / WEIGHTS, *(f for f in parts if f.suffix in (".json", ".safetensors"))]
    # Hidden files do not affect the output: one of them only caches the digest of the weights.
    return {str(f.relative_to(folder)): sha256_of_file(f) for f in files if not f.name.startswith(".")}


def read_projector(model: str | Path, config: ModelConfig) -> "SpeechProjector":
    """Load a model's trained projector in float32, frozen, on the CPU.

    Raises:
        ModelError: the weights are missing, damaged or not finite, or contradict the configuration.
    """
    path = local_path(model) / WEIGHTS
    weights = _load(path, "convert the checkpoint again")
    options = config.typed_recipe.projector
    return projector_from_weights(weights, options, config.encoder_width, config.llm_width, str(path))


def _load(path: Path, remedy: str) -> dict[str, "torch.Tensor"]:
    """Read a safetensors file; if it is damaged or missing, raise a `ModelError` that names the remedy."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {remedy}.") from error


def projector_from_weights(
    weights: Mapping[str, "torch.Tensor"], options: Projector, encoder_width: int, llm_width: int, where: str
) -> "SpeechProjector":
    """Build a frozen float32 projector from its weights.

    Args:
        weights: the weights keyed by name in `SpeechProjector`, of any floating-point dtype.
        options: the recipe's section `projector`.
        encoder_width: values per encoder frame.
        llm_width: values per LLM position.
        where: the origin of the weights, for error messages.

    Raises:
        ModelError: the weights are not finite, or do not fit the options and widths.
    """
    import torch

    from slam_asr.models.projector import build_projector

    # On the meta device, no memory is allocated for initial weights that are replaced below.
    with torch.device("meta"):
        projector = build_projector(options, encoder_width, llm_width)
    expected = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
    actual = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != actual:
        name, *others = [n for n in expected | actual if expected.get(n) != actual.get(n)]
        raise ModelError(
            f"{where} does not fit a {options.kind} projector with k = {options.downsampling} from encoder "
            f"width {encoder_width} to LLM width {llm_width}: {name} is {actual.get(name, 'missing')}, "
            f"not {expected.get(name, 'expected')}"
            f"{f', and {len(others)} more differ' if others else ''}. "
            "Name the encoder, LLM and projector that it was trained with."
        )
    for name, tensor in weights.items():
        _require_finite(name, tensor, where)
    # Assigned, because nothing can be copied into tensors on the meta device.
    projector.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return projector.eval().requires_grad_(False)


def write_adapter(
    folder: Path, weights: Mapping[str, "torch.Tensor"], recipe: Recipe, half: bool = False
) -> None:
    """Write a LoRA adapter in peft's format.

    Args:
        folder: the model's folder. The adapter is written to `adapter/` in it.
        weights: the adapter's weights keyed by name in the LLM, such as `…q_proj.lora_A.default.weight`.
        recipe: gives rank, alpha and target modules of the adapter, and the LLM's name.
        half: whether to save the adapter in bf16 instead of fp32.
    """
    from slam_asr.models.llm import lora_config

    config = lora_config(recipe.llm.lora)
    config.base_model_name_or_path, config.task_type = recipe.llm.name, "CAUSAL_LM"
    config.inference_mode = True
    # peft has made a set of the names, whose order would differ from one run to the next.
    config.target_modules = list(recipe.llm.lora.targets)
    (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder / ADAPTER))
    tensors = {_PEFT + name.replace(".default.", "."): t for name, t in weights.items()}
    _save(folder / ADAPTER / ADAPTER_WEIGHTS, tensors, half)


def read_adapter(model: str | Path) -> dict[str, "torch.Tensor"]:
    """Read a model's LoRA adapter.

    Args:
        model: the model's local folder.

    Returns:
        The adapter's weights on the CPU keyed by name in the LLM. Empty if the model has no adapter.

    Raises:
        ModelError: the adapter's file is damaged or missing.
    """
    folder = local_path(model) / ADAPTER
    return read_peft(folder) if folder.is_dir() else {}


def adapter_file(folder: Path) -> Path:
    """Find the file with the weights in a folder that peft wrote: safetensors, or else a pickle.

    Raises:
        ModelError: the folder has no such file.
    """
    for name in (ADAPTER_WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(
        f"{folder} holds no LoRA adapter (no {ADAPTER_WEIGHTS}, no adapter_model.bin): "
        "give the folder that peft wrote."
    )


def read_peft(folder: Path) -> dict[str, "torch.Tensor"]:
    """Read the weights in a folder that peft wrote.

    Returns:
        The adapter's weights on the CPU keyed by name in the LLM.

    Raises:
        ModelError: the adapter's file is damaged or missing.
    """
    from slam_asr.pretrained.unpickle import read_pickle

    file = adapter_file(folder)
    remedy = "copy it again, or convert the checkpoint again"
    weights = read_pickle(file) if file.suffix == ".bin" else _load(file, remedy)
    # peft's files omit the adapter's name: `….lora_A.weight` stands for `….lora_A.default.weight`.
    return {re.sub(r"\.([^.]+)$", r".default.\1", n.removeprefix(_PEFT)): t for n, t in weights.items()}


def require_matching_weights(
    module: "nn.Module", weights: Mapping[str, "torch.Tensor"], where: str, trained: list[str]
) -> None:
    """Check that weights fit a module.

    Args:
        module: the module, which may be on the meta device.
        weights: the weights keyed by name in the module.
        where: the checkpoint's path, for error messages.
        trained: the names that `weights` must contain. Other names in `weights` must exist in the module.

    Raises:
        ModelError: a weight is missing, unknown, of another shape, or not finite.
    """
    # Duplicates are included, because a tied weight has several names.
    own = dict(module.named_parameters(remove_duplicate=False))
    missing = [n for n in trained if n not in weights]
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} weights, such as {missing[0]}: it belongs to another recipe."
        )
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else None
            raise ModelError(
                f"{where}: {name} is {tuple(tensor.shape)}, but this LLM or encoder "
                f"{f'has {shape} there' if shape else 'has no such weight'}: it belongs to another model."
            )
        _require_finite(name, tensor, where)


def _require_finite(name: str, tensor: "torch.Tensor", where: str) -> None:
    from slam_asr.pretrained.lazy_tensors import is_finite

    if not is_finite(tensor):
        raise ModelError(
            f"{where}: {name} holds values that are not finite, because the training diverged: "
            "use an earlier checkpoint."
        )


def replace_weights(
    module: "nn.Module", weights: Mapping[str, "torch.Tensor"], where: str, trained: list[str]
) -> None:
    """Check weights with `require_matching_weights`, then copy them into the module.

    The module's other weights remain unchanged. The arguments are those of `require_matching_weights`.

    Raises:
        ModelError: the weights do not fit.
    """
    require_matching_weights(module, weights, where, trained)
    # Not strict, because `weights` lacks the module's frozen weights. The check above has already refused any
    # other difference.
    module.load_state_dict(weights, strict=False)


def shipped_models() -> dict[str, Path]:
    """Return the folder of each model that comes with the package, keyed by name."""
    return {folder.name: folder for folder in sorted(SHIPPED.glob("*")) if folder.is_dir()}


def fetch_model(model: str | os.PathLike) -> Path:
    """Return the local folder of a model, fetching it first if it is in object storage.

    Args:
        model: the name of a shipped model, or the path or s3:// prefix of any other.

    Raises:
        OSError: the local disk is full, or fails.
        StorageError: the prefix holds no objects, or cannot be read.
    """
    return shipped_models().get(str(model)) or fetch_folder(model)
