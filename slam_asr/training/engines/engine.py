"""The interface between the training loop and an engine.

The loss of an optimiser step is the mean over the step's target tokens on all processes. Engines average
gradients over processes as if each process had the same number of targets, but the numbers differ. Each
process therefore sums the loss over its own targets, and multiplies the sum by `processes / targets of the
step`. The averaged gradient is then exactly the gradient of the mean: with P processes, T targets and the
summed loss L_p of process p, 1/P · Σ P/T · L_p = Σ L_p / T.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slam_asr.config.recipe import Training
from slam_asr.models.batch import Batch
from slam_asr.models.ctc import CtcBatch
from slam_asr.models.slam import Slam
from slam_asr.training.ctc_model import CtcModel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of the two state tensors that Adam holds for each weight."""


@dataclass
class Update:
    """The result of an optimiser step."""

    applied: bool
    """Whether the weights changed; False if a gradient was not finite."""
    gradient_norm: float | None
    """2-norm of the gradient of all trained weights, before clipping. None if it is not finite, or if the
    engine does not compute it."""


class ParameterGroups:
    """The trained weights, grouped by the part of the model that they belong to.

    Args:
        model: its direct children are the parts.
        options: gives the default peak learning rate.
        learning_rates: peak learning rates of the parts that have their own, keyed by name.
    """

    def __init__(
        self, model: nn.Module, options: Training, learning_rates: Mapping[str, float | None]
    ) -> None:
        parts = {
            name: [(n, p) for n, p in part.named_parameters(name) if p.requires_grad]
            for name, part in model.named_children()
        }
        self.parts = {name: weights for name, weights in parts.items() if weights}
        self.peaks = {name: learning_rates.get(name) or options.learning_rate for name in self.parts}
        self.relative_rates = [peak / options.learning_rate for peak in self.peaks.values()]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All trained weights by name, in the optimiser's order."""
        return dict(item for weights in self.parts.values() for item in weights)

    def for_optimizer(self) -> list[dict[str, Any]]:
        """Return the parameter groups in the form that torch's optimisers take."""
        return [
            {"params": [p for _, p in weights], "lr": self.peaks[name]}
            for name, weights in self.parts.items()
        ]

    def set_rates(self, groups: list[dict[str, Any]], learning_rate: float) -> None:
        """Set the learning rate of each optimiser group, in proportion to the group's peak.

        Args:
            groups: the optimiser's `param_groups`, in the order of `parts`; changed in place.
            learning_rate: this step's rate for parts without a peak of their own.
        """
        for group, relative in zip(groups, self.relative_rates, strict=True):
            group["lr"] = learning_rate * relative


class Engine(ABC):
    """A model with AdamW on its trained weights, which stay identical on all processes.

    The model computes in the recipe's precision. AdamW updates fp32 copies of the trained weights,
    the *masters*. A checkpoint holds the masters and Adam's moments as complete fp32 tensors, so that any
    engine on any number of processes can resume from it.
    """

    module: nn.Module
    """The wrapped model, which takes a batch. Validation calls it directly; training calls `forward`."""
    model: Slam | CtcModel
    """The model without the engine's wrapper. All processes must call its methods together."""
    groups: ParameterGroups
    adam: torch.optim.AdamW

    def forward(self, batch: Batch | CtcBatch, last: bool) -> Any:
        """Run the model in training.

        Args:
            batch: one micro-batch, on the engine's device.
            last: whether the optimiser steps after this micro-batch.

        Returns:
            The model's output: logits [targets, vocabulary], or the fields of `AnswerScores`.
        """
        return self.module(batch)

    def try_llm(self, trial: Callable[[PreTrainedModel], bool]) -> bool:
        """Run a trial on the LLM.

        An engine that shards weights gathers them while the LLM runs. All processes must call this method
        together.

        Args:
            trial: function that takes the LLM, may call it, and returns whether the trial succeeded.

        Returns:
            The result of `trial`.
        """
        assert isinstance(self.model, Slam), "a CtcModel has no LLM"
        return self.model.try_llm(trial)

    @abstractmethod
    def backward(self, loss_sum: torch.Tensor, step_targets: int, last: bool) -> None:
        """Accumulate the gradient of one micro-batch.

        Args:
            loss_sum: scalar; the loss summed over this process's targets of the micro-batch.
            step_targets: target tokens of the complete step, over all processes.
            last: whether the optimiser steps after this micro-batch.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> Update:
        """Update the weights with the accumulated gradient, and clear the gradient.

        Args:
            learning_rate: this step's rate, for parts without a peak of their own.
        """

    @abstractmethod
    def get_state(self, name: str, which: str) -> torch.Tensor:
        """Return one complete tensor of the optimiser's state. All processes must call this method together.

        Args:
            name: name of a trained weight.
            which: `weight` for its master, or one of `MOMENTS`.

        Returns:
            A tensor in fp32 and in the shape of the complete weight, on any device.
        """

    @abstractmethod
    def set_state(self, name: str, which: str, value: torch.Tensor) -> None:
        """Overwrite one tensor of the optimiser's state. Each process takes its own part of `value`.

        Call `finish_restoring` when all tensors are set.

        Args:
            name: name of a trained weight.
            which: `weight` for its master, or one of `MOMENTS`.
            value: the complete tensor in fp32, in the shape of the complete weight.
        """

    @torch.no_grad()
    def finish_restoring(self, updates: int) -> None:
        """Make the rest of the engine consistent with the state that `set_state` wrote.

        Copies the masters into the weights that the model computes with, and sets Adam's step count.

        Args:
            updates: number of updates that Adam has made so far.
        """
        for state in self.adam.state.values():
            state["step"].fill_(updates)
        self._copy_masters()

    @abstractmethod
    def _copy_masters(self) -> None:
        """Copy the masters into the weights that the model computes with, where the two are different."""

    def updates(self) -> int:
        """Return the number of updates that Adam has made so far."""
        return max((int(state["step"]) for state in self.adam.state.values() if "step" in state), default=0)

    def _create_adam_state(self, masters: Iterable[torch.Tensor]) -> None:
        """Create the state that Adam would create at its first step, for those masters that have none.

        A checkpoint may be saved or restored before that step, so the tensors must already exist.
        """
        for master in masters:
            if not self.adam.state[master]:
                moments = {moment: torch.zeros_like(master) for moment in MOMENTS}
                self.adam.state[master] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    def _state_of(self, master: torch.Tensor, which: str) -> torch.Tensor:
        """Return a master itself (`weight`), or one of its moments."""
        return master if which == "weight" else self.adam.state[master][which]

    @abstractmethod
    def loss_scale(self) -> dict[str, float]:
        """Return the state of the dynamic loss scale; empty if the engine does not scale the loss."""

    @abstractmethod
    def set_loss_scale(self, values: dict[str, float]) -> None:
        """Restore the state that `loss_scale` returned, perhaps that of another engine."""

    def state_to_save(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield this process's share of the optimiser's state.

        The weights are dealt out to the processes in turn. Every process takes part in gathering every
        tensor, so all processes must run this generator to its end.

        Yields:
            (name of the weight, `weight` or one of `MOMENTS`, tensor). The tensor is complete, in fp32 and on
            the CPU.
        """
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # Each process saves complete tensors, not its shards: another number of processes can then resume.
        for index, name in enumerate(self.groups.weights):
            for which in ("weight", *MOMENTS):
                tensor = self.get_state(name, which)
                if index % processes == rank:
                    # A copy: training continues while another thread writes it.
                    yield name, which, tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def move_and_cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Cast a model's weights to `dtype`, and move weights and buffers to `device`.

    Weights on the meta device are cast but not moved, because they have no values yet.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to("meta" if parameter.is_meta else device, dtype)
    # Not `model.to(dtype)`, which would cast buffers too. The frequencies of rotary embeddings are a buffer,
    # and in bf16 the angles of late positions would be wrong.
    # See https://github.com/huggingface/transformers/issues/25681.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def is_finite(norm: float | torch.Tensor | None) -> bool:
    """Whether a gradient's norm is finite. None, an unknown norm, counts as finite.

    DeepSpeed reports a norm that is not finite as -1, so a negative norm counts as not finite.
    """
    return norm is None or bool(math.isfinite(norm) and norm >= 0)
