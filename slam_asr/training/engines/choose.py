"""Creates the engine that a recipe names, and the process group it needs."""

import os
from collections.abc import Mapping, Sequence

import torch

from slam_asr.config.recipe import Training
from slam_asr.models.slam import Slam
from slam_asr.pretrained.meta_llm import LazyWeight
from slam_asr.training.ctc_model import CtcModel
from slam_asr.training.engines.deepspeed_engine import DeepSpeedEngine
from slam_asr.training.engines.engine import Engine


def make_engine(
    model: Slam | CtcModel,
    options: Training,
    device: torch.device,
    learning_rates: Mapping[str, float | None],
    lazy_weights: Sequence[LazyWeight] = (),
) -> Engine:
    """Wrap a model in the engine that `training.engine` names.

    Args:
        model: on any device, except for `lazy_weights`, which are on the meta device.
        options: the recipe's section `training`.
        device: where the model trains.
        learning_rates: peak learning rates, keyed by the name of a direct child of the model. The other
            children, and those with None, get `training.learning_rate`.
        lazy_weights: weights that the engine reads from disk; only for engines that shard weights.

    Raises:
        UserError: a lazy weight cannot be read, or is not finite.
    """
    if options.engine == "deepspeed":
        return DeepSpeedEngine(model, options, device, learning_rates, lazy_weights)
    from slam_asr.training.engines.torch_engine import TorchEngine

    return TorchEngine(model, options, device, learning_rates, lazy_weights)


def start_process_group(device: torch.device, engine: str) -> None:
    """Join the process group of the processes that torchrun started: NCCL on GPUs, gloo on CPUs.

    Args:
        device: this process's device.
        engine: `training.engine`; DeepSpeed has to create its process group itself.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if engine != "deepspeed":
        torch.distributed.init_process_group(backend)
        return
    if device.type == "cpu":
        # Set before the import: otherwise DeepSpeed would guess its accelerator, and warn.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile its shared-memory all-reduce on first use. That takes a minute, and fails
    # without a compiler. gloo's all-reduce is fast enough for a projector.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
