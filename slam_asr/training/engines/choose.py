"""The engine that a recipe asks for, and the processes it runs on."""

import torch
from torch import nn

from slam_asr.recipe import Training
from slam_asr.training.engines.engine import Engine
from slam_asr.training.engines.zero import DeepSpeedEngine, name_accelerator


def make_engine(model: nn.Module, options: Training, device: torch.device, learning_rates: dict[str, float]) -> Engine:
    """The model under `training.engine`.

    Args:
        model: on any device.
        options: of the recipe.
        device: where it trains.
        learning_rates: peaks of those parts of the model (its direct children) that have their own.
    """
    if options.engine == "deepspeed":
        return DeepSpeedEngine(model, options, device, learning_rates)
    from slam_asr.training.engines.masters import MastersEngine

    return MastersEngine(model, options, device, learning_rates)


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
