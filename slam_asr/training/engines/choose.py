"""The engine that a recipe asks for, and the processes it runs on."""

from collections.abc import Sequence

import torch
from torch import nn

from slam_asr.models.sharded import StoredWeight
from slam_asr.recipe import Training
from slam_asr.training.engines.deepspeed_engine import DeepSpeedEngine, name_accelerator
from slam_asr.training.engines.engine import Engine


def spreads_weights(options: Training) -> bool:
    """Whether a process under `training.engine` holds a share of the frozen weights, rather than all of them."""
    return options.engine == "fsdp" or options.zero_stage == 3


def make_engine(
    model: nn.Module,
    options: Training,
    device: torch.device,
    learning_rates: dict[str, float],
    stored: Sequence[StoredWeight] = (),
) -> Engine:
    """The model under `training.engine`.

    Args:
        model: on any device, but for what is stored: that is on the meta device.
        options: of the recipe.
        device: where it trains.
        learning_rates: peaks of those parts of the model (its direct children) that have their own.
        stored: weights that are still to be read, by an engine that spreads them.

    Raises:
        UserError: one cannot be read, or is not finite.
    """
    if options.engine == "deepspeed":
        return DeepSpeedEngine(model, options, device, learning_rates, stored)
    from slam_asr.training.engines.torch_engine import TorchEngine

    return TorchEngine(model, options, device, learning_rates, stored)


def start_process_group(device: torch.device, engine: str) -> None:
    """Join the processes that torchrun started."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if engine != "deepspeed":
        torch.distributed.init_process_group(backend)
        return
    name_accelerator(device)
    import deepspeed

    # Its all-reduce through shared memory is compiled on first use: a minute of waiting, or a failure where
    # there is no compiler. gloo's is fast enough for a projector.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
