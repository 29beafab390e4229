"""DeepSpeed behind the few calls that the loop makes.

DeepSpeed averages gradients over processes as if all had seen equally many targets. They have not,
so each process scales the sum over its own targets by processes / targets of the whole step, and
the average becomes the mean over all target tokens of the step, accumulation included.
"""

import os
import re
from pathlib import Path

import torch
from torch import nn

from slam_asr.errors import UserError
from slam_asr.recipe import Training

TRAINED = "trained_weights"
"""Under this name a checkpoint tells what is in each of the optimiser's groups, in which order."""


class DeepSpeedEngine:
    """The model under DeepSpeed, with AdamW on its trainable weights.

    Args:
        model: on any device; weights that require no gradient stay as they are.
        options: precision, ZeRO stage, clipping, weight decay.
        device: where it trains.
        learning_rates: peaks of those parts of the model (its direct children) that have their own.
    """

    def __init__(
        self, model: nn.Module, options: Training, device: torch.device, learning_rates: dict[str, float] | None = None
    ) -> None:
        _name_accelerator(device)
        import deepspeed

        parts = {name: [(n, p) for n, p in part.named_parameters(name) if p.requires_grad] for name, part in model.named_children()}
        peaks = {name: (learning_rates or {}).get(name, options.learning_rate) for name, weights in parts.items() if weights}
        groups = [{"params": [p for _, p in parts[name]], "lr": peak} for name, peak in peaks.items()]
        self.trained = [[n for n, _ in parts[name]] for name in peaks]
        """Names of the trained weights, by group."""
        self.relative_rates = [peak / options.learning_rate for peak in peaks.values()]
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        self.engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(options, device)
        )
        self.groups = optimizer.param_groups
        self.processes = torch.distributed.get_world_size()
        self._forget_warm_up_step(optimizer)

    @staticmethod
    def _forget_warm_up_step(optimizer: torch.optim.Optimizer) -> None:
        # DeepSpeed's half-precision optimiser of stage 0 allocates its state with a step over zero
        # gradients, which leaves Adam's bias correction one step ahead: the first real update
        # would be a quarter too small.
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()

    def backward(self, loss_sum: torch.Tensor, targets_of_step: int, last: bool) -> None:
        """Accumulate the gradient of one micro-batch.

        Args:
            loss_sum: summed over this process' targets of the micro-batch.
            targets_of_step: target tokens of the whole step, over all processes.
            last: whether the optimiser steps after this one.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss_sum * (self.processes / targets_of_step), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """To be called after each `backward`; updates the weights after the step's last one.

        Args:
            learning_rate: of this step; that of a part with a peak of its own is in proportion.
        """
        for group, relative in zip(self.groups, self.relative_rates, strict=True):
            group["lr"] = learning_rate * relative
        self.engine.step()

    def save(self, folder: Path, tag: str, state: dict) -> None:
        """Write a checkpoint without frozen weights; all processes call it.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        try:
            self.engine.save_checkpoint(
                str(folder), tag=tag, client_state={**state, TRAINED: self.trained}, save_latest=False,
                exclude_frozen_parameters=True,
            )
        except (OSError, RuntimeError) as error:
            # torch tells of a failed write as a RuntimeError of its zip writer.
            if isinstance(error, RuntimeError) and not re.search("inline_container|StreamWriter", str(error)):
                raise
            raise UserError(
                f"The checkpoint {folder / tag} could not be written (disk full, or no permission?): free some space or "
                "choose another output folder, then run the same command again."
            ) from error


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
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        # DeepSpeed's own Adam for the host has to be compiled where it runs; torch's does the same arithmetic.
        config["zero_force_ds_cpu_optimizer"] = False
    if options.nodes > 1:
        # Each machine writes to its own disk; without this, only the first one would make the checkpoint's folder.
        config["checkpoint"] = {"use_node_local_storage": True}
    if options.precision != "fp32":
        config[options.precision] = {"enabled": True}
    return config


def start_process_group(device: torch.device) -> None:
    """Join the processes that torchrun started."""
    _name_accelerator(device)
    import deepspeed

    # Its all-reduce through shared memory is compiled on first use: a minute of waiting, or a failure where
    # there is no compiler. gloo's is fast enough for a projector.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def _name_accelerator(device: torch.device) -> None:
    # DeepSpeed decides at import, and without a hint it warns or guesses.
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
