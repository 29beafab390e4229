"""PyTorch's own ways of training on several processes: DDP, where each holds the whole model, and FSDP2, where each holds a part.

Trained weights are computed with in the recipe's precision and kept in fp32 beside it, as DeepSpeed
does: an update of a ten-thousandth is less than bf16 can tell from nothing.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from slam_asr.models.precision import DTYPES
from slam_asr.models.sharded import StoredWeight
from slam_asr.recipe import Training
from slam_asr.training.engines.engine import MOMENTS, Engine, Groups, Update, is_finite, move_and_cast

FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
"""fp16's loss scale at the start, and the good steps after which it doubles: as torch's own GradScaler has them."""


_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _BUFFERS = "broadcast_buffers"  # its name before torch 2.13


class TorchEngine(Engine):
    """The model under DDP or FSDP2, with AdamW on fp32 copies of its trained weights.

    Args:
        model: on any device; moved to `device`.
        options: engine, precision, clipping, weight decay.
        device: where it trains.
        learning_rates: peaks of those parts of the model (its direct children) that have their own.
        stored: weights that are still to be read; FSDP2 alone can.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Training,
        device: torch.device,
        learning_rates: dict[str, float] | None = None,
        stored: Sequence[StoredWeight] = (),
    ) -> None:
        dtype = DTYPES[options.precision]
        move_and_cast(model, device, dtype)
        if options.engine == "fsdp":
            shard(model, device)
            for weight in stored:
                read_share(weight, device)
            self.module = model
        else:
            # Statistics of batch norms, if there are any, belong to frozen parts: nothing to send round.
            self.module = DistributedDataParallel(model, **{_BUFFERS: False})
        self.bare = model
        self.groups = Groups(model, options, learning_rates or {})
        self.processes = torch.distributed.get_world_size()
        self.clipping = options.gradient_clipping
        # In fp32 the weights are their own masters.
        self.masters: dict[str, torch.Tensor] = {
            name: p if dtype == torch.float32 else p.detach().float()
            for name, p in self.groups.weights.items()
        }
        groups = self.groups.for_optimizer()
        for group, weights in zip(groups, self.groups.parts.values(), strict=True):
            group["params"] = [self.masters[name] for name, _ in weights]
        self.adam = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        self.scale = FIRST_SCALE if options.precision == "fp16" else 1.0
        self.scales = options.precision == "fp16"
        self.good_steps = 0

    def forward(self, batch: Any, last: bool) -> Any:
        # The backward pass averages over processes behind the last micro-batch only; before, each adds up its own.
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        else:
            # What `no_sync` sets, which as a context would have to span the backward pass too.
            self.module.require_backward_grad_sync = last
        return self.module(batch)

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        found = super().try_llm(trial)
        if isinstance(self.module, FSDPModule):
            # What was put together for it would go on to be computed with, whatever a checkpoint brings.
            self.module.reshard()
        return found

    def backward(self, loss_sum: torch.Tensor, targets_of_step: int, last: bool) -> None:
        (loss_sum * (self.scale * self.processes / targets_of_step)).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> Update:
        self.groups.set_rates(self.adam.param_groups, learning_rate)
        weights = self.groups.weights
        for name, parameter in weights.items():
            if parameter.grad is not None:
                master = self.masters[name]
                master.grad = parameter.grad.to(master.dtype)
                if self.scales:
                    master.grad /= self.scale
        norm = self._norm()
        applied = is_finite(norm)
        if applied:
            if self.clipping and norm > self.clipping:
                for master in self.masters.values():
                    master.grad *= self.clipping / norm
            self.adam.step()
            for name, parameter in weights.items():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        for name, parameter in weights.items():
            parameter.grad = self.masters[name].grad = None
        if self.scales:
            self._adapt_scale(applied)
        return Update(applied, norm if applied else None)

    def _norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _adapt_scale(self, good: bool) -> None:
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.scale *= 2

    def state_of(self, name: str, which: str) -> torch.Tensor:
        self._make_state()
        master = self.masters[name]
        tensor = master if which == "weight" else self.adam.state[master][which]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def put_state(self, name: str, which: str, value: torch.Tensor) -> None:
        self._make_state()
        master = self.masters[name]
        tensor = master if which == "weight" else self.adam.state[master][which]
        value = value.to(tensor.device)
        if isinstance(tensor, DTensor):
            # All processes hold the same value, so that nothing need be sent.
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)

    def _make_state(self) -> None:
        """Give Adam the state that it would make at its first step."""
        for master in self.masters.values():
            if not self.adam.state[master]:
                self.adam.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    **{m: torch.zeros_like(master) for m in MOMENTS},
                }

    @torch.no_grad()
    def finish_restoring(self, updates: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(updates)
        for name, parameter in self.groups.weights.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def updates(self) -> int:
        return max((int(state["step"]) for state in self.adam.state.values()), default=0)

    def loss_scale(self) -> dict[str, float]:
        return {"cur_scale": self.scale, "good_steps": float(self.good_steps)} if self.scales else {}

    def put_loss_scale(self, values: dict[str, float]) -> None:
        # Those of DeepSpeed have a scale too, and other counts.
        self.scale = values.get("cur_scale", self.scale)
        self.good_steps = int(values.get("good_steps", 0))


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a model's weights over all processes: each layer of the LLM by itself, the rest together.

    A layer is put together where it is needed and taken apart behind it, so that no more than two are
    whole at a time.
    """
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    wrap = functools.partial(fully_shard, mesh=mesh)
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        wrap(layer)
    wrap(model)
    for method in ("generate", "search", "try_llm"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def read_share(weight: StoredWeight, device: torch.device) -> None:
    """Read this process' rows of a weight that FSDP2 has spread before it had values."""
    whole = weight.parameter
    # As torch.chunk divides them: equal shares, but for the last ones with fewer rows or none.
    share = -(-len(whole) // whole.device_mesh.size())
    rows = weight.read_into(
        torch.empty_like(whole.to_local(), device=device), share * whole.device_mesh.get_local_rank()
    )
    weight.put(
        DTensor.from_local(
            rows,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
    )
