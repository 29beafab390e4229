"""DeepSpeed as an engine: ZeRO stages 0 to 3, with or without offload of the optimiser.

Each stage holds the fp32 masters and Adam's state in a different place, and creates them at a different time.
The methods below hide these differences from the training loop, which saves complete tensors instead of
DeepSpeed's own files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slam_asr.config.recipe import Training
from slam_asr.models.precision import DTYPES
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight
from slam_asr.training.ctc_model import CtcModel
from slam_asr.training.engines.engine import Engine, ParameterGroups, Update, is_finite, move_and_cast

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The attributes of DeepSpeed's loss scaler that change during training."""


class DeepSpeedEngine(Engine):
    """The model under DeepSpeed, with AdamW on its trained weights.

    Args:
        model: on any device.
        options: precision, ZeRO stage, offload, clipping, weight decay, default learning rate, and
            DeepSpeed's own settings.
        device: where the model trains.
        learning_rates: peak learning rates, keyed by the name of a direct child of the model. The other
            children, and those with None, get `training.learning_rate`.
        lazy_weights: weights that the engine reads from disk; ZeRO stage 3 only.
    """

    def __init__(
        self,
        model: Slam | CtcModel,
        options: Training,
        device: torch.device,
        learning_rates: Mapping[str, float | None] | None = None,
        lazy_weights: Sequence[LazyWeight] = (),
    ) -> None:
        import deepspeed

        config = deepspeed_config(options, device)
        if lazy_weights:
            # The cast comes first, because DeepSpeed does not change the dtype of partitioned weights.
            move_and_cast(model, device, DTYPES[options.precision])
            read_and_partition(lazy_weights, config, device)
        self.model = model
        self.groups = ParameterGroups(model, options, learning_rates or {})
        adam_options = _json_settings(options).get("optimizer", {}).get("params", {})
        self.adam = torch.optim.AdamW(
            self.groups.for_optimizer(), weight_decay=options.weight_decay, **adam_options
        )
        self.module: Any = deepspeed.initialize(model=model, optimizer=self.adam, config=config)[0]
        # DeepSpeed has replaced the weights in Adam's groups with its own masters.
        self.optimizer: Any = self.module.optimizer
        self.processes = torch.distributed.get_world_size()
        self.half, self.scales_loss = options.precision != "fp32", options.precision == "fp16"
        self.stage = options.zero_stage
        if self.stage in (1, 2):
            # By default, these stages check gradients for NaN only in half precision. In fp32, a single NaN
            # would ruin the weights for good.
            self.optimizer.check_grad_overflow = True
        self._has_state = False
        self._reset_step_count()

    def _reset_step_count(self) -> None:
        # DeepSpeed's half-precision optimiser of stage 0 creates Adam's state by a step over zero gradients.
        # That leaves Adam's bias correction one step ahead. With Adam's default betas the first real update
        # would be 0.1/0.19 / √(0.001/0.002) = 0.74 of its size: a quarter too small.
        for state in self.adam.state.values():
            if "step" in state:
                state["step"].zero_()

    def backward(self, loss_sum: torch.Tensor, step_targets: int, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        # The loss is already divided by the targets of the complete step, so DeepSpeed must not divide it by
        # the number of micro-batches.
        self.module.backward(loss_sum * (self.processes / step_targets), scale_wrt_gas=False)
        if not last:
            # Before the last micro-batch, DeepSpeed's `step` only counts micro-batches.
            self.module.step()

    def step(self, learning_rate: float) -> Update:
        self.groups.set_rates(self.adam.param_groups, learning_rate)
        norm: float | None
        if self.stage == 0:
            # The norm is read before the step, which clears the gradients. At this point, the gradients are
            # still multiplied by the loss scale.
            gradients = [p.grad for p in self.groups.weights.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale().get("cur_scale", 1.0)
            if not self.half and not is_finite(norm):
                # In fp32, stage 0 passes gradients to Adam unchecked.
                self.module.zero_grad()
                return Update(applied=False, gradient_norm=None)
            self.module.step()
        else:
            self.module.step()
            reported = self.module.get_global_grad_norm()
            norm = None if reported is None else float(reported)
        applied = is_finite(norm) and not getattr(self.optimizer, "overflow", False)
        return Update(applied, norm if is_finite(norm) else None)

    def get_state(self, name: str, which: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        # Adam creates its state at the first update, but a checkpoint may be written before it.
        self._create_state()
        if self.stage == 0:
            return self._state_of(self._masters[name], which)
        parameter = self.groups.weights[name]
        if which == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, which)

    def set_state(self, name: str, which: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_state()
        if self.stage == 0:
            self._state_of(self._masters[name], which).data.copy_(value)
            return
        parameter: Any = self.groups.weights[name]  # with the attributes that DeepSpeed adds
        if self.stage == 3:
            # DeepSpeed partitions a weight into slices of equal length, so the last slice may reach beyond
            # the weight's end. The setters below cut `value` into these slices, but accept only `ds_numel`
            # values. So `value` is padded, and `ds_numel` is set to the padded length during the call.
            value = nn.functional.pad(value.flatten(), (0, -value.numel() % self.processes))
            parameter.ds_numel, unpadded = len(value), parameter.ds_numel
        if which == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, which)
        if self.stage == 3:
            parameter.ds_numel = unpadded

    @property
    def _masters(self) -> Mapping[str, torch.Tensor]:
        """The fp32 masters under stage 0, keyed by name."""
        if not self.half:
            return self.groups.weights
        # DeepSpeed's groups and their weights are in the same order as Adam's and as `groups.weights`.
        flat = [p for group in self.optimizer.fp32_groups for p in group]
        return dict(zip(self.groups.weights, flat, strict=True))

    def _create_state(self) -> None:
        """Create Adam's state once, with `_create_adam_state`, and link it to DeepSpeed's weights."""
        if self._has_state:
            return
        self._has_state = True
        # Stage 3 puts a group's masters into Adam's groups only during a step.
        masters = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else [p for g in self.adam.param_groups for p in g["params"]]
        )
        self._create_adam_state(masters)
        if self.stage in (1, 2):
            # DeepSpeed links Adam's state to the weights only once, at its first step, when only the first
            # group has state. So the links are made again here, for all groups.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _copy_masters(self) -> None:
        if self.stage == 0 and self.half:
            for name, parameter in self.groups.weights.items():
                parameter.copy_(self._masters[name])
        elif self.stage in (1, 2):
            # "lp" (low precision) are the weights that the model computes with.
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            # DeepSpeed's own loading of checkpoints copies the masters to the weights with this method.
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def loss_scale(self) -> dict[str, float]:
        keys = [key for key in _SCALE if hasattr(self._scaler, key)] if self.scales_loss else []
        return {key: float(getattr(self._scaler, key)) for key in keys}

    def set_loss_scale(self, values: dict[str, float]) -> None:
        for key in set(_SCALE) & set(values) if self.scales_loss else ():
            setattr(self._scaler, key, values[key] if key == "cur_scale" else int(values[key]))

    @property
    def _scaler(self) -> Any:
        """The object with the attributes in `_SCALE`. DeepSpeed names it differently in stage 0."""
        name = "loss_scale_config" if self.stage == 0 else "loss_scaler"
        return getattr(self.optimizer, name)


def read_and_partition(
    lazy_weights: Sequence[LazyWeight], config: dict[str, Any], device: torch.device
) -> None:
    """Read weights one by one, and partition each over all processes as ZeRO stage 3 does.

    Only the first process reads from disk; DeepSpeed broadcasts the values.

    Args:
        lazy_weights: weights on the meta device; their values are read and put in place.
        config: DeepSpeed's configuration.
        device: where the model trains.

    Raises:
        UserError: a weight cannot be read, or is not finite.
    """
    import deepspeed

    # All weights pass through one buffer of the size of the largest weight. With a buffer for each weight,
    # the allocator would not always return the freed memory, which would be in pieces of many sizes.
    largest = max((weight.parameter for weight in lazy_weights), key=torch.numel)
    buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=device)
    converted: Any = None
    """The first weight that is partitioned; DeepSpeed adds methods to it."""
    for weight in lazy_weights:
        shape = weight.parameter.shape
        values = buffer[: shape.numel()].view(shape)
        if torch.distributed.get_rank() == 0:  # DeepSpeed broadcasts the values to the other processes
            weight.read_into(values)
        parameter = weight.put(values)
        if converted is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
            converted = parameter
        else:
            # `zero.Init` has added this method, which partitions further weights in the same way.
            converted.convert_to_zero_parameters(param_list=[parameter])


def deepspeed_config(options: Training, device: torch.device) -> dict[str, Any]:
    """Translate the recipe's section `training` into DeepSpeed's configuration.

    Micro-batch size and accumulation are both set to 1 but have no effect: batches are planned by LLM
    positions, and the training loop marks the last micro-batch of each step.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": options.zero_stage},
        "gradient_clipping": options.gradient_clipping,
        "steps_per_print": 10**9,
    }
    if options.offload_optimizer:
        offload = {"device": "cpu", "pin_memory": device.type == "cuda"}
        config["zero_optimization"]["offload_optimizer"] = offload
        # DeepSpeed's own Adam for the CPU would have to be compiled at run time. torch's computes the same.
        config["zero_force_ds_cpu_optimizer"] = False
    if options.precision != "fp32":
        config[options.precision] = {"enabled": True}
    unused = ("optimizer", *_INACTIVE[options.precision])
    settings = {key: value for key, value in _json_settings(options).items() if key not in unused}
    return _merged(config, settings)


def _json_settings(options: Training) -> dict[str, Any]:
    """Return the settings in `training.deepspeed`: those that have no key of their own in the recipe."""
    assert isinstance(options.deepspeed, dict), "load_recipe has read the file, if it was a path"
    return options.deepspeed


_INACTIVE = {"fp32": ("fp16", "bf16"), "bf16": ("fp16",), "fp16": ("bf16",)}
"""Sections of DeepSpeed's JSON that are left out, keyed by the training's precision."""


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries. For a key in both, the value of `overrides` wins."""
    nested = {
        key: _merged(base[key], value)
        for key, value in overrides.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **overrides, **nested}
