"""What the loop asks of an engine, whichever it is.

The loss of a step is the mean over its target tokens on all processes. Engines average gradients over
processes as if all had seen equally many targets; they have not, so each process scales the sum over
its own targets by processes / targets of the whole step, and the average becomes that mean,
accumulation included.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slam_asr.recipe import Training

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of each weight, by torch's names."""


@dataclass
class Update:
    """What became of an optimiser step."""

    applied: bool
    """Whether weights were changed; not where a gradient was not finite."""
    gradient_norm: float | None
    """2-norm over all trained weights before clipping, or None where the engine does not compute it."""


class Groups:
    """The trained weights, by the part of the model they belong to.

    Args:
        model: its direct children are the parts.
        options: the learning rate.
        learning_rates: peaks of those parts that have their own.
    """

    def __init__(self, model: nn.Module, options: Training, learning_rates: dict[str, float]) -> None:
        parts = {
            name: [(n, p) for n, p in part.named_parameters(name) if p.requires_grad]
            for name, part in model.named_children()
        }
        self.parts = {name: weights for name, weights in parts.items() if weights}
        self.peaks = {name: learning_rates.get(name, options.learning_rate) for name in self.parts}
        self.relative_rates = [peak / options.learning_rate for peak in self.peaks.values()]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All of them by name, in the optimiser's order."""
        return dict(item for weights in self.parts.values() for item in weights)

    def for_optimizer(self) -> list[dict]:
        """Parameter groups as torch's optimisers take them."""
        return [
            {"params": [p for _, p in weights], "lr": self.peaks[name]}
            for name, weights in self.parts.items()
        ]

    def set_rates(self, groups: list[dict], learning_rate: float) -> None:
        """Give each group its share of this step's learning rate."""
        for group, relative in zip(groups, self.relative_rates, strict=True):
            group["lr"] = learning_rate * relative


class Engine(ABC):
    """A model whose trained weights AdamW updates, on all processes alike."""

    module: nn.Module
    """What is called with a batch; in validation directly."""
    bare: nn.Module
    """The model itself; what it does beside `forward` is done by all processes alike."""
    groups: Groups

    def forward(self, batch: Any, last: bool) -> Any:
        """The model's outputs, in training.

        Args:
            batch: what the model takes.
            last: whether the optimiser steps after this micro-batch.
        """
        return self.module(batch)

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        """Find something out about the LLM, which may be called for it; all processes do so together.

        Args:
            trial: what to do with it.

        Returns:
            What `trial` does.
        """
        return self.bare.try_llm(trial)

    @abstractmethod
    def backward(self, loss_sum: torch.Tensor, targets_of_step: int, last: bool) -> None:
        """Accumulate the gradient of one micro-batch.

        Args:
            loss_sum: summed over this process' targets of the micro-batch.
            targets_of_step: target tokens of the whole step, over all processes.
            last: whether the optimiser steps after this one.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> Update:
        """Update the weights by what was accumulated, and forget it.

        Args:
            learning_rate: of this step; that of a part with a peak of its own is in proportion.
        """

    @abstractmethod
    def state_of(self, name: str, which: str) -> torch.Tensor:
        """One whole tensor of the optimiser in fp32, on whatever device; all processes call it together.

        Args:
            name: of a trained weight.
            which: `weight` for its master copy, or one of `MOMENTS`.
        """

    @abstractmethod
    def put_state(self, name: str, which: str, value: torch.Tensor) -> None:
        """The reverse of `state_of`."""

    @abstractmethod
    def finish_restoring(self, updates: int) -> None:
        """Bring everything else in line with what `put_state` put.

        Args:
            updates: that Adam has made so far.
        """

    @abstractmethod
    def updates(self) -> int:
        """Updates that Adam has made so far."""

    @abstractmethod
    def loss_scale(self) -> dict[str, float]:
        """What a dynamic loss scale goes by; empty where there is none."""

    @abstractmethod
    def put_loss_scale(self, values: dict[str, float]) -> None:
        """The reverse of `loss_scale`."""

    def share(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """This process' share of the optimiser's state: whole tensors on the host, (weight's name, which, tensor).

        Weights go round among the processes. Every tensor is put together on all of them, one after
        the other, so all processes must go through this to its end.
        """
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for at, name in enumerate(self.groups.weights):
            for which in ("weight", *MOMENTS):
                tensor = self.state_of(name, which)
                if at % processes == rank:
                    # A copy: training goes on while it is written.
                    yield name, which, tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def move_and_cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring weights to a precision and, with the buffers, to a device, but for those that have no values yet."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to("meta" if parameter.is_meta else device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def is_finite(norm: float | torch.Tensor | None) -> bool:
    """Whether a gradient's norm is a number; DeepSpeed gives -1 for one that is not."""
    return norm is None or (math.isfinite(norm) and norm >= 0)
