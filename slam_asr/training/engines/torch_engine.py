"""PyTorch's own engines: DDP (each process holds the complete model) and FSDP2 (each holds a shard).

The model computes in the recipe's precision. AdamW updates fp32 masters of the trained weights, as under
DeepSpeed. Without masters, small updates would be lost: bf16 has 8 significant bits, so a relative change of
1e-4 rounds to no change at all.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from slam_asr.config.recipe import Training
from slam_asr.models.batch import Batch
from slam_asr.models.ctc import CtcBatch
from slam_asr.models.precision import DTYPES
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight
from slam_asr.training.ctc_model import CtcModel
from slam_asr.training.engines.engine import Engine, ParameterGroups, Update, is_finite, move_and_cast

FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
"""Initial loss scale for fp16, and the number of finite steps in a row after which it doubles.

Both are the defaults of `torch.amp.GradScaler`.
"""


_SYNC_BUFFERS = "forward_sync_buffers"
"""Name of DDP's option that synchronises the model's buffers over processes in each forward pass."""
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # its name before torch 2.13


class TorchEngine(Engine):
    """The model under DDP or FSDP2, with AdamW on fp32 masters of its trained weights.

    Args:
        model: on any device; moved to `device`.
        options: engine, precision, clipping, weight decay, and the default learning rate.
        device: where the model trains.
        learning_rates: peak learning rates, keyed by the name of a direct child of the model. The other
            children, and those with None, get `training.learning_rate`.
        lazy_weights: weights that the engine reads from disk; FSDP2 only.
    """

    def __init__(
        self,
        model: Slam | CtcModel,
        options: Training,
        device: torch.device,
        learning_rates: Mapping[str, float | None] | None = None,
        lazy_weights: Sequence[LazyWeight] = (),
    ) -> None:
        dtype = DTYPES[options.precision]
        move_and_cast(model, device, dtype)
        if options.engine == "fsdp":
            shard(model, device)
            for weight in lazy_weights:
                read_local_rows(weight, device)
            self.module = model
        else:
            # Buffers are not synchronised. Among the supported models, only a HuBERT with batch norm in its
            # positional convolution has buffers that change, and only if the encoder is trained. In that case
            # each process has running statistics of its own utterances, and no checkpoint holds them.
            buffer_options: dict[str, Any] = {_SYNC_BUFFERS: False}
            self.module = DistributedDataParallel(model, **buffer_options)
        self.model = model
        # Not earlier: sharding and reading replace the parameters by new objects.
        self.groups = ParameterGroups(model, options, learning_rates or {})
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
        self.scales_loss = options.precision == "fp16"
        self.scale = FIRST_SCALE if self.scales_loss else 1.0
        self.good_steps = 0

    def forward(self, batch: Batch | CtcBatch, last: bool) -> Any:
        # Gradients are averaged over processes once per step, in the backward pass of the last micro-batch.
        # Before that, each process accumulates its own gradients.
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        else:
            assert isinstance(self.module, DistributedDataParallel)
            # DDP's context manager `no_sync` sets this flag too, but it must also enclose the backward pass.
            self.module.require_backward_grad_sync = last
        return self.module(batch)

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        result = super().try_llm(trial)
        if isinstance(self.module, FSDPModule):
            # FSDP2 leaves the root's weights gathered after a call. The next forward pass would use these
            # copies, even if a checkpoint overwrites the shards in between.
            self.module.reshard()
        return result

    def backward(self, loss_sum: torch.Tensor, step_targets: int, last: bool) -> None:
        (loss_sum * (self.scale * self.processes / step_targets)).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> Update:
        self.groups.set_rates(self.adam.param_groups, learning_rate)
        weights = self.groups.weights
        for name, parameter in weights.items():
            if parameter.grad is not None:
                # The cast to fp32 comes before the division by the loss scale: in fp16, small gradients would
                # underflow.
                master = self.masters[name]
                master.grad = parameter.grad.to(master.dtype)
                if self.scales_loss:
                    master.grad /= self.scale
        # An overflow in any gradient makes this norm infinite or NaN. The norm covers all shards, so all
        # processes make the same decision.
        norm = self._norm()
        applied = is_finite(norm)
        if applied:
            if self.clipping and norm > self.clipping:
                for master in self.masters.values():
                    if master.grad is not None:
                        master.grad *= self.clipping / norm
            self.adam.step()
            self._copy_masters()
        for name, parameter in weights.items():
            parameter.grad = self.masters[name].grad = None
        if self.scales_loss:
            self._adapt_scale(applied)
        return Update(applied, norm if applied else None)

    def _norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _adapt_scale(self, finite: bool) -> None:
        """Halve the loss scale after an overflow; double it after `GROWTH_INTERVAL` finite steps in a row."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.scale *= 2

    def get_state(self, name: str, which: str) -> torch.Tensor:
        self._create_adam_state(self.masters.values())
        tensor = self._state_of(self.masters[name], which)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def set_state(self, name: str, which: str, value: torch.Tensor) -> None:
        self._create_adam_state(self.masters.values())
        tensor = self._state_of(self.masters[name], which)
        value = value.to(tensor.device)
        if isinstance(tensor, DTensor):
            # Every process has read the same complete tensor: `src_data_rank=None` takes the local shard from
            # it without communication.
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)

    def _copy_masters(self) -> None:
        for name, parameter in self.groups.weights.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def loss_scale(self) -> dict[str, float]:
        return {"cur_scale": self.scale, "good_steps": float(self.good_steps)} if self.scales_loss else {}

    def set_loss_scale(self, values: dict[str, float]) -> None:
        # DeepSpeed's state has the same name for the scale, but counts steps differently.
        self.scale = values.get("cur_scale", self.scale)
        self.good_steps = int(values.get("good_steps", 0))


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model's weights over all processes with FSDP2: each layer is one unit, the rest is another.

    FSDP2 gathers a layer's weights just before the layer runs and frees them afterwards. With prefetching, at
    most two layers are complete at a time.
    """
    # The layers are sharded before the model, whose unit takes all weights that are in no other unit yet.
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    wrap = functools.partial(fully_shard, mesh=mesh)
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        wrap(layer)
    wrap(model)
    # FSDP2 gathers the root's weights only around `forward`, unless other entry points are registered.
    for method in ("generate", "search", "try_llm"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def read_local_rows(weight: LazyWeight, device: torch.device) -> None:
    """Read this process's rows of a weight that FSDP2 sharded on the meta device.

    No process ever holds the complete weight.

    Raises:
        ModelError: the rows cannot be read, or are not finite.
    """
    sharded = weight.parameter
    assert isinstance(sharded, DTensor)
    # FSDP2 divides rows as torch.chunk does: shards of equal size, except that the last ones may have fewer
    # rows or none.
    mesh = sharded.device_mesh
    first_row = -(-len(sharded) // mesh.size()) * mesh.get_local_rank()
    rows = weight.read_into(torch.empty_like(sharded.to_local(), device=device), first_row)
    shape, stride = sharded.shape, sharded.stride()
    weight.put(
        DTensor.from_local(rows, mesh, sharded.placements, run_check=False, shape=shape, stride=stride)
    )
