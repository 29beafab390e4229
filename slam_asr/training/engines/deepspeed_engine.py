"""DeepSpeed behind the calls that the loop makes."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slam_asr.models.precision import DTYPES
from slam_asr.models.sharded import StoredWeight
from slam_asr.recipe import Training
from slam_asr.training.engines.engine import MOMENTS, Engine, Groups, Update, is_finite, move_and_cast

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(Engine):
    """The model under DeepSpeed, with AdamW on its trainable weights.

    Args:
        model: on any device; weights that require no gradient stay as they are.
        options: precision, ZeRO stage, clipping, weight decay.
        device: where it trains.
        learning_rates: peaks of those parts of the model (its direct children) that have their own.
        stored: weights that are still to be read; stage 3 alone can.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Training,
        device: torch.device,
        learning_rates: dict[str, float] | None = None,
        stored: Sequence[StoredWeight] = (),
    ) -> None:
        name_accelerator(device)
        import deepspeed

        config = deepspeed_config(options, device)
        if stored:
            # DeepSpeed takes a model that is partitioned already as it is.
            move_and_cast(model, device, DTYPES[options.precision])
            read_and_partition(stored, config, device)
        self.bare = model
        self.groups = Groups(model, options, learning_rates or {})
        self.trained = [[n for n, _ in weights] for weights in self.groups.parts.values()]
        """Names of the trained weights, by group."""
        theirs = options.deepspeed.get("optimizer", {}).get("params", {})
        self.adam = torch.optim.AdamW(
            self.groups.for_optimizer(), weight_decay=options.weight_decay, **theirs
        )
        self.module, _, _, _ = deepspeed.initialize(model=model, optimizer=self.adam, config=config)
        # DeepSpeed replaces a group's weights by its own masters, which are what Adam knows from then on.
        self.optimizer: Any = self.module.optimizer
        self.processes = torch.distributed.get_world_size()
        self.half, self.scales = options.precision != "fp32", options.precision == "fp16"
        self.stage = options.zero_stage
        if self.stage in (1, 2):
            # Left alone, it looks for NaN in fp16 only, and bad values would spoil the weights for good.
            self.optimizer.check_grad_overflow = True
        self._state_is_there = False
        self._forget_warm_up_step()

    def _forget_warm_up_step(self) -> None:
        # DeepSpeed's half-precision optimiser of stage 0 allocates its state with a step over zero
        # gradients, which leaves Adam's bias correction one step ahead: the first real update
        # would be a quarter too small.
        for state in self.adam.state.values():
            if "step" in state:
                state["step"].zero_()

    def backward(self, loss_sum: torch.Tensor, targets_of_step: int, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss_sum * (self.processes / targets_of_step), scale_wrt_gas=False)
        if not last:
            self.module.step()

    def step(self, learning_rate: float) -> Update:
        self.groups.set_rates(self.adam.param_groups, learning_rate)
        if self.stage == 0:
            gradients = [p.grad for p in self.groups.weights.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale().get("cur_scale", 1.0)
            if not self.half and not is_finite(norm):
                # Nothing of DeepSpeed's stands between these gradients and Adam.
                self.module.zero_grad()
                return Update(applied=False, gradient_norm=None)
            self.module.step()
        else:
            self.module.step()
            found = self.module.get_global_grad_norm()
            norm = None if found is None else float(found)
        applied = is_finite(norm) and not getattr(self.optimizer, "overflow", False)
        return Update(applied, norm if is_finite(norm) else None)

    def state_of(self, name: str, which: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        # A checkpoint may be wanted before the first update.
        self._make_state()
        parameter = self.groups.weights[name]
        if self.stage == 0:
            master = self._masters[name]
            return master if which == "weight" else self.adam.state[master][which]
        return (
            safe_get_full_fp32_param(parameter)
            if which == "weight"
            else safe_get_full_optimizer_state(parameter, which)
        )

    def put_state(self, name: str, which: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_state()
        parameter = self.groups.weights[name]
        if self.stage == 0:
            master = self._masters[name]
            (master if which == "weight" else self.adam.state[master][which]).data.copy_(value)
            return
        if self.stage == 3:
            # Each process takes a slice as long as any other's, and the last one's reaches beyond the end.
            value = nn.functional.pad(value.flatten(), (0, -value.numel() % self.processes))
            parameter.ds_numel, whole = len(value), parameter.ds_numel
        if which == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, which)
        if self.stage == 3:
            parameter.ds_numel = whole

    @property
    def _masters(self) -> dict[str, torch.Tensor]:
        """The fp32 weights of stage 0, by name."""
        if not self.half:
            return self.groups.weights
        flat = [p for group in self.optimizer.fp32_groups for p in group]
        return dict(zip(self.groups.weights, flat, strict=True))

    def _make_state(self) -> None:
        """Give Adam the state that it would make at its first step, and let DeepSpeed find it."""
        if self._state_is_there:
            return
        self._state_is_there = True
        stage_3 = self.stage == 3  # which lets Adam know of a group's masters only while it steps
        for master in (
            self.optimizer.fp32_partitioned_groups_flat
            if stage_3
            else [p for g in self.adam.param_groups for p in g["params"]]
        ):
            if not self.adam.state[master]:
                self.adam.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    **{m: torch.zeros_like(master) for m in MOMENTS},
                }
        if self.stage in (1, 2):
            # Its own look, at its first step, comes before there is a state of any group but the first.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def finish_restoring(self, updates: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(updates)
        if self.stage == 0 and self.half:
            for name, parameter in self.groups.weights.items():
                parameter.copy_(self._masters[name])
        elif self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def updates(self) -> int:
        return max((int(state["step"]) for state in self.adam.state.values() if "step" in state), default=0)

    def loss_scale(self) -> dict[str, float]:
        return (
            {key: float(getattr(self._scaler, key)) for key in _SCALE if hasattr(self._scaler, key)}
            if self.scales
            else {}
        )

    def put_loss_scale(self, values: dict[str, float]) -> None:
        for key in set(_SCALE) & set(values) if self.scales else ():
            setattr(self._scaler, key, values[key] if key == "cur_scale" else int(values[key]))

    @property
    def _scaler(self) -> Any:
        """What keeps the scale: an object of its own from ZeRO stage 1 on."""
        return getattr(self.optimizer, "loss_scaler", None) or getattr(
            self.optimizer, "loss_scale_config", None
        )


def read_and_partition(stored: Sequence[StoredWeight], config: dict, device: torch.device) -> None:
    """Read weights one by one in the first process, and leave each process its share of it, as stage 3 has it.

    Args:
        stored: on the meta device until then.
        config: DeepSpeed's.
        device: where it trains.
    """
    import deepspeed

    # One after the other is whole in the same place: memory that is freed in pieces is not always given back.
    largest = max((weight.parameter for weight in stored), key=torch.numel)
    room = torch.empty(largest.numel(), dtype=largest.dtype, device=device)
    converted: nn.Parameter | None = None
    for weight in stored:
        shape = weight.parameter.shape
        whole = room[: shape.numel()].view(shape)
        if torch.distributed.get_rank() == 0:  # which sends them round
            weight.read_into(whole)
        parameter = weight.put(whole)
        if converted is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
            converted = parameter
        else:
            converted.convert_to_zero_parameters(param_list=[parameter])


def deepspeed_config(options: Training, device: torch.device) -> dict:
    """The recipe's training section in DeepSpeed's own words.

    The micro-batch size is nominal: batches are planned by positions, and the loop says itself
    where a step ends.
    """
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": options.zero_stage},
        "gradient_clipping": options.gradient_clipping,
        "steps_per_print": 10**9,
    }
    if options.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": device.type == "cuda",
        }
        # DeepSpeed's own Adam for the host has to be compiled where it runs; torch's does the same arithmetic.
        config["zero_force_ds_cpu_optimizer"] = False
    if options.precision != "fp32":
        config[options.precision] = {"enabled": True}
    return _joined(
        config,
        {
            key: value
            for key, value in options.deepspeed.items()
            if key not in ("optimizer", *_OTHER[options.precision])
        },
    )


_OTHER = {"fp32": ("fp16", "bf16"), "bf16": ("fp16",), "fp16": ("bf16",)}
"""Sections of a DeepSpeed JSON that are of another precision, and off."""


def _joined(ours: dict, theirs: dict) -> dict:
    """Nested dictionaries as one; nothing of ours is replaced but by keys of the user's own."""
    both = {
        key: _joined(ours[key], value)
        for key, value in theirs.items()
        if isinstance(value, dict) and isinstance(ours.get(key), dict)
    }
    return {**ours, **theirs, **both}


def name_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed, which decides at import and would warn or guess."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
