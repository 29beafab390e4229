"""Accepts DeepSpeed's own JSON as part of a recipe (`training.deepspeed`).

Settings for which a recipe has keys (ZeRO stage, precision, offload, clipping, learning rate, batch) are
moved into those keys. If the recipe sets such a key to another value, it is refused with a message that names
both. Settings without a key in a recipe are passed on to DeepSpeed unchanged. Keys that DeepSpeed does not
know are refused, because DeepSpeed would silently ignore them. Settings for things that this training does in
its own way are refused too.

The names are those of DeepSpeed 0.19.8.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slam_asr.config.schema import nearest
from slam_asr.errors import ConfigurationError
from slam_asr.storage import fetch

KEY = "deepspeed"

ZERO = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "legacy_stage1",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
    "compute_grad_norm",
    # The keys below concern DeepSpeed's own checkpoints, which are not used here: they have no effect.
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "pipeline_loading_checkpoint",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": ZERO,
    "zero_optimization.offload_optimizer": (
        "device",
        "pin_memory",
        "buffer_count",
        "ratio",
        "fast_init",
        "pipeline_read",
        "pipeline_write",
    ),
    "zero_optimization.offload_param": ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"),
    "fp16": (
        "enabled",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
    ),
    "bf16": ("enabled", "immediate_grad_update", "check_grad_overflow"),
    "optimizer": ("type", "params"),
    "optimizer.params": (
        "lr",
        "weight_decay",
        "betas",
        "eps",
        "torch_adam",
        "adam_w_mode",
        "bias_correction",
    ),
}
"""Sections whose keys are checked, and the keys they may have."""
PASSED_ON = (
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "steps_per_print",
    "dump_state",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "aio",
    "disable_python_gc",
    "activation_checkpointing",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "fp32_allreduce",
    "compile",
)
"""Sections and keys that are passed on to DeepSpeed unchecked."""
REFUSED = {
    "scheduler": "the learning rate follows training.schedule and training.warmup_steps",
    "amp": "precision is training.precision",
    "torch_autocast": "precision is training.precision",
    "curriculum_learning": "the order of the utterances is this training's own",
    "data_efficiency": "the order of the utterances is this training's own",
    "elasticity": "a step is fixed by the recipe, whatever the number of processes",
    "autotuning": "`slam-asr plan` finds settings that fit the memory",
    "compression_training": "nothing is compressed here",
    "quantize_training": "nothing is compressed here",
    "sparse_attention": "the LLM's attention is its own",
    "sparse_gradients": "no gradient is sparse here",
    "pipeline": "ZeRO stage 3 shards layers over processes",
    "checkpoint": "checkpoints are written by training.checkpoint_every",
    "load_universal_checkpoint": "a training resumes from checkpoints of any number of processes by itself",
    "data_types": "gradients are accumulated in the recipe's precision",
    "tensorboard": "TensorBoard's files are always written",
    "wandb": "set training.trackers: [wandb]",
    "csv_monitor": "curve.jsonl contains all numbers",
}
"""Keys that are refused, and what this training does instead."""


def _offload(device: object) -> bool:
    """Whether an offload device of DeepSpeed is the CPU rather than none."""
    if device not in ("cpu", "none", None):
        raise ValueError(f"must be cpu or none, not {device!r}")
    return device == "cpu"


DECIDES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "zero_optimization.stage": ("zero_stage", int),
    "zero_optimization.offload_optimizer.device": ("offload_optimizer", _offload),
    "gradient_clipping": ("gradient_clipping", float),
    "optimizer.params.lr": ("learning_rate", float),
    "optimizer.params.weight_decay": ("weight_decay", float),
    "train_micro_batch_size_per_gpu": ("utterances_per_batch", int),
    "gradient_accumulation_steps": ("accumulation", int),
}
"""DeepSpeed's keys that have a counterpart in a recipe's section `training`: its name and the conversion."""


def adopt(values: dict[str, Any], where: str) -> None:
    """Divide the settings in `training.deepspeed` between the recipe and DeepSpeed.

    Args:
        values: a recipe's values before their types are checked, changed in place. `training.deepspeed` holds
            DeepSpeed's keys and values, or the name of a JSON file of them.
        where: name of the recipe, for error messages.

    Raises:
        ConfigurationError: the file cannot be read as JSON, or a key is unknown or contradicts the recipe.
    """
    training = values.get("training")
    if not isinstance(training, dict) or not training.get(KEY):
        return
    source = training[KEY]
    settings, named = (
        (_read(source, where), f"{where}: training.{KEY} ({source})")
        if isinstance(source, str)
        else (source, f"{where}: training.{KEY}")
    )
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{named} must contain DeepSpeed's keys and values, or name a JSON file of them."
        )
    # `auto` leaves a value to the program that calls DeepSpeed: here, to the recipe.
    settings = {key: _numbers(value) for key, value in settings.items() if value != "auto"}
    _refuse_unknown(settings, named)
    for key, (ours, convert) in DECIDES.items():
        _take(settings, key, training, ours, convert, named)
    _take_precision(settings, training, named)
    _take_optimizer(settings, named)
    if settings.pop("train_batch_size", None) is not None and not training.get("utterances_per_batch"):
        raise ConfigurationError(
            f"{named} sets train_batch_size without train_micro_batch_size_per_gpu: set both, or neither and "
            "training.positions_per_step instead."
        )
    training[KEY] = settings


def _numbers(value: Any) -> Any:
    """Copy a value, and turn texts such as `1e-8` into numbers.

    YAML 1.1 reads `1e-8` as text, because it requires a point in the number: `1.0e-8`.
    """
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _read(path: str, where: str) -> Any:
    """Read a JSON file, local or in object storage."""
    try:
        return json.loads(Path(fetch(path)).read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{where}: training.{KEY} names {path}, which cannot be read as JSON ({error}): name "
            "DeepSpeed's JSON file, or write its keys here."
        ) from error


def _refuse_unknown(settings: dict[str, Any], named: str) -> None:
    """Refuse unknown and unsupported keys of the first level, and unknown keys within their sections."""
    known = [*SECTIONS, *PASSED_ON, *DECIDES, "train_batch_size"]
    top = sorted({key.partition(".")[0] for key in known})
    for key, value in settings.items():
        if key in REFUSED:
            raise ConfigurationError(f"{named}: {key} is not supported: {REFUSED[key]}. Leave it out.")
        if key not in top:
            raise ConfigurationError(
                f"{named}: DeepSpeed has no key {key}{nearest(key, [*top, *REFUSED]) or '.'}"
            )
        _refuse_unknown_within(key, value, named)


def _refuse_unknown_within(section: str, value: object, named: str) -> None:
    """Refuse unknown keys within one section and its own sections."""
    if section not in SECTIONS:
        return
    if not isinstance(value, dict):
        raise ConfigurationError(f"{named}: {section} must contain keys, not {value!r}.")
    for key, inner in value.items():
        if key not in SECTIONS[section]:
            raise ConfigurationError(
                f"{named}: DeepSpeed, as used here, has no key {section}.{key}"
                f"{nearest(key, list(SECTIONS[section])) or '.'}"
            )
        _refuse_unknown_within(f"{section}.{key}", inner, named)


def _pop(settings: dict[str, Any], key: str) -> Any:
    """Remove a key, given with its sections (`fp16.enabled`). Return its value, or None if it is not set."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.get(section, {})
    return settings.pop(last, None)


def _take(
    settings: dict[str, Any],
    key: str,
    training: dict[str, Any],
    ours: str,
    convert: Callable[[Any], Any],
    named: str,
) -> None:
    """Move one setting into the recipe's key `ours`."""
    value = _pop(settings, key)
    if value is None or value == "auto":
        return
    try:
        value = convert(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{named}: {key} is {value!r}: {error}.") from error
    _agree(training, ours, value, key, named)


def _agree(training: dict[str, Any], ours: str, value: object, key: str, named: str) -> None:
    """Set the recipe's key `ours`, unless the recipe sets it to another value."""
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
            f"{named}: optimizer.type is {optimizer['type']}, but this training's optimiser is AdamW: "
            "choose Adam or AdamW, or leave it out."
        )
    # `lr` and `weight_decay` are no longer among these: they have been moved into the recipe's keys.
    params = {k: v for k, v in optimizer.get("params", {}).items() if v != "auto"}
    for switch in ("adam_w_mode", "bias_correction"):
        if params.pop(switch, True) is not True:
            raise ConfigurationError(
                f"{named}: optimizer.params.{switch} is false, but this training's AdamW always has it on: "
                "leave it out."
            )
    params.pop("torch_adam", None)  # chooses torch's AdamW, which is used here in any case
    if params:
        settings["optimizer"] = {"params": params}
