"""Accepts DeepSpeed's own JSON as part of a recipe (`training.deepspeed`).

Settings for which a recipe has keys (ZeRO stage, precision, offload, clipping, learning rate, weight decay,
batch, accumulation) are moved into those keys. A recipe that sets such a key to another value is refused,
with a message that names both. Other settings are passed on to DeepSpeed. Keys that DeepSpeed does not
know are refused, because DeepSpeed would silently ignore them. Settings for things that slam-asr does in
its own way are refused too. `train_batch_size` is dropped if the batch and the accumulation are set, because
it is their product with the number of processes. Without them it is refused.

The names are those of DeepSpeed 0.19.8, in `deepspeed_keys.yaml`.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slam_asr.config.schema import as_int, nearest, read_yaml
from slam_asr.errors import ConfigurationError
from slam_asr.storage import read_bytes

KEY = "deepspeed"
AUTO = "auto"
"""DeepSpeed's word for a value that the calling program chooses: here, the recipe."""


@functools.cache
def known_keys() -> Any:
    """Return DeepSpeed's keys: the `checked` ones by section, then those `passed_on` and those `refused`."""
    return read_yaml(Path(__file__).with_name("deepspeed_keys.yaml").read_bytes(), "DeepSpeed's keys")


def _offload(device: object) -> bool:
    """Return whether DeepSpeed offloads to the CPU; raise ValueError for devices other than cpu and none."""
    if device not in ("cpu", "none", None):
        raise ValueError(f"must be cpu or none, not {device!r}")
    return device == "cpu"


COUNTERPARTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "zero_optimization.stage": ("zero_stage", int),
    "zero_optimization.offload_optimizer.device": ("offload_optimizer", _offload),
    "gradient_clipping": ("gradient_clipping", float),
    "optimizer.params.lr": ("learning_rate", float),
    "optimizer.params.weight_decay": ("weight_decay", float),
    "train_micro_batch_size_per_gpu": ("utterances_per_batch", int),
    "gradient_accumulation_steps": ("accumulation", int),
}
"""For each of DeepSpeed's keys with a counterpart in a recipe's section `training`: the counterpart's name,
and the conversion of the value."""


def adopt(values: dict[str, Any], where: str) -> None:
    """Divide the settings in `training.deepspeed` between the recipe and DeepSpeed.

    Args:
        values: a recipe's values before their types are checked, changed in place. `training.deepspeed` holds
            DeepSpeed's keys and values, or the name of a JSON file of them.
        where: name of the recipe, for error messages.

    Raises:
        ConfigurationError: the file cannot be read as JSON, or a key is unknown, refused, or contradicts
            the recipe.
    """
    training = values.get("training")
    if not isinstance(training, dict) or not training.get(KEY):
        return
    settings, named = training[KEY], f"{where}: training.{KEY}"
    if isinstance(settings, str):
        settings, named = _read(settings, named), f"{named} ({settings})"
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{named} must contain DeepSpeed's keys and values, or name a JSON file of them."
        )
    _refuse_unknown(settings, named)
    settings = _plain(settings)
    _take_counterparts(settings, training, named)
    _take_precision(settings, training, named)
    _take_optimizer(settings, named)
    # DeepSpeed would compute a missing batch or accumulation from the number of processes, which is not known
    # here.
    batch_and_accumulation = training.get("utterances_per_batch") and training.get("accumulation")
    if settings.pop("train_batch_size", None) is not None and not batch_and_accumulation:
        raise ConfigurationError(
            f"{named} sets train_batch_size without train_micro_batch_size_per_gpu and "
            "gradient_accumulation_steps: set all three, or leave all three out and set "
            "training.positions_per_step."
        )
    training[KEY] = settings


def _read(path: str, named: str) -> Any:
    """Read a JSON file, local or in object storage."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{named} names {path}, which cannot be read as JSON ({error}): name "
            "DeepSpeed's JSON file, or write its keys here."
        ) from error


def _refuse_unknown(settings: dict[str, Any], named: str) -> None:
    """Refuse unknown and unsupported keys of the first level, and unknown keys within their sections."""
    checked, passed_on, refused = known_keys().values()
    top = sorted({key.partition(".")[0] for key in (*checked, *passed_on, *COUNTERPARTS, "train_batch_size")})
    for key, value in settings.items():
        # `auto` requests nothing, so it does no harm in a key that is not supported.
        if value == AUTO:
            continue
        if key in refused:
            raise ConfigurationError(f"{named}: {key} is not supported: {refused[key]}. Leave it out.")
        if key not in top:
            raise ConfigurationError(
                f"{named}: DeepSpeed has no key {key}{nearest(key, [*top, *refused]) or '.'}"
            )
        _refuse_unknown_within(key, value, checked, named)


def _refuse_unknown_within(section: str, value: object, checked: dict[str, list[str]], named: str) -> None:
    """Refuse unknown keys within one section and its own sections."""
    if section not in checked:
        return
    if not isinstance(value, dict):
        raise ConfigurationError(f"{named}: {section} must contain keys, not {value!r}.")
    for key, inner in value.items():
        if key not in checked[section]:
            raise ConfigurationError(
                f"{named}: DeepSpeed, as used here, has no key {section}.{key}"
                f"{nearest(key, checked[section]) or '.'}"
            )
        _refuse_unknown_within(f"{section}.{key}", inner, checked, named)


def _plain(value: Any) -> Any:
    """Copy a value without keys that are `auto`, and with texts such as `1e-8` as numbers.

    YAML 1.1 reads `1e-8` as text, because it requires a point in the number: `1.0e-8`.
    """
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner != AUTO}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return as_int(float(value))
    return value


def _pop(settings: dict[str, Any], key: str) -> Any:
    """Remove a key, given with its sections (`fp16.enabled`). Return its value, or None if it is not set."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.get(section, {})
    return settings.pop(last, None)


def _take_counterparts(settings: dict[str, Any], training: dict[str, Any], named: str) -> None:
    """Move the settings that have a counterpart in the recipe into its keys."""
    for key, (ours, convert) in COUNTERPARTS.items():
        value = _pop(settings, key)
        if value is None:
            continue
        try:
            value = convert(value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{named}: {key} is {value!r}: {error}.") from error
        _agree(training, ours, value, key, named)


def _agree(training: dict[str, Any], ours: str, value: object, key: str, named: str) -> None:
    """Set the recipe's key `ours`, unless the recipe sets it to another value."""
    # Only a value that the recipe itself sets can contradict; a default cannot.
    if ours in training and training[ours] != value:
        raise ConfigurationError(
            f"{named}: {key} is {value}, but the recipe's training.{ours} is {training[ours]}: make them "
            "equal, or leave one of them out."
        )
    training[ours] = value


def _take_precision(settings: dict[str, Any], training: dict[str, Any], named: str) -> None:
    """Move `fp16.enabled` or `bf16.enabled` into the recipe's `precision`."""
    enabled = [name for name in ("fp16", "bf16") if _pop(settings, f"{name}.enabled")]
    if len(enabled) > 1:
        raise ConfigurationError(f"{named}: fp16 and bf16 are both enabled: choose one.")
    for name in enabled:
        _agree(training, "precision", name, f"{name}.enabled", named)


def _take_optimizer(settings: dict[str, Any], named: str) -> None:
    """Reduce the section `optimizer` to the arguments of torch's AdamW."""
    optimizer = settings.pop("optimizer", None)
    if optimizer is None:
        return
    if optimizer.get("type", "AdamW").lower() not in ("adam", "adamw"):
        raise ConfigurationError(
            f"{named}: optimizer.type is {optimizer['type']}, but slam-asr's optimiser is AdamW: "
            "choose Adam or AdamW, or leave it out."
        )
    # `lr` and `weight_decay` are no longer among these: they have been moved into the recipe's keys.
    params = optimizer.get("params", {})
    for switch in ("adam_w_mode", "bias_correction"):
        if params.pop(switch, True) is not True:
            raise ConfigurationError(
                f"{named}: optimizer.params.{switch} is false, but slam-asr's AdamW always has it on: "
                "leave it out."
            )
    params.pop("torch_adam", None)  # chooses torch's AdamW, which is used here in any case
    if params:
        settings["optimizer"] = {"params": params}
