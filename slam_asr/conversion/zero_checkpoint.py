"""Reads DeepSpeed's checkpoints of ZeRO stages 0 to 3 as complete fp32 tensors.

The layout, as DeepSpeed 0.19 writes it below `global_stepN/`:

- Stage 0: `mp_rank_00_model_states.pt` contains the weights. In half precision it also contains the fp32
  master weights, in `optimizer.fp32_groups`, in the order of the trainable weights. A fused optimiser writes
  them to `fp32_groups_flat` instead, which is not read: the half-precision weights are then converted.
- Stages 1 and 2: the master weights of each parameter group are flattened and concatenated, and each rank's
  `*zero_pp_rank_R_*_optim_states.pt` contains a slice of the result. `param_shapes` in the model file gives
  the order and shapes of the weights.
- Stage 3: every weight is padded and cut into equal slices, one per rank. A rank's `fp32_flat_groups` is the
  concatenation of its slices of all weights.

The files are read by `slam_asr.pretrained.unpickle`: the few classes of DeepSpeed that they contain are
replaced by inert stand-ins, and any class that is neither one of these nor torch's is refused. No code from a
file ever runs, and DeepSpeed need not be installed. The files are memory-mapped, and each tensor is assembled
when it is accessed.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slam_asr.errors import ModelError
from slam_asr.pretrained.lazy_tensors import LazyTensors
from slam_asr.pretrained.unpickle import read_pickle
from slam_asr.progress import log_line

_ALLOWED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


def fp32_weights(folder: Path) -> LazyTensors:
    """Open a checkpoint's trained weights in fp32, keyed by name; each is assembled when it is accessed.

    Args:
        folder: `…/global_stepN`.

    Returns:
        The complete tensors, float32, each in the shape of its weight.

    Raises:
        ModelError: files are missing or damaged, do not belong together, or contain classes that are neither
            DeepSpeed's nor torch's.
    """
    models = _by_rank(folder, "*model_states.pt")
    if not models:
        raise ModelError(
            f"{folder} has no DeepSpeed checkpoint (no *model_states.pt): give the folder of a training run."
        )
    model = read_pickle(models[0], _ALLOWED)
    try:
        return _weights_of(folder, model)
    # Files that DeepSpeed did not write lack keys, or have values of other types.
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{models[0]} and the optimiser's files next to it are not a checkpoint as DeepSpeed writes it: "
            "copy the complete checkpoint again."
        ) from error


def _weights_of(folder: Path, model: dict[str, Any]) -> LazyTensors:
    """Open a checkpoint's weights; `model` is the content of its first model file."""
    optimisers = _by_rank(folder, "*optim_states.pt")
    # Only ZeRO writes `param_shapes`. Its fp32 weights are in the optimiser's files alone.
    if not optimisers and not model.get("param_shapes"):
        return _stage_0(model)
    ranks = int(model["dp_world_size"])
    if len(optimisers) != ranks:
        raise ModelError(
            f"{folder} holds {len(optimisers)} of {ranks} optimiser shards, which contain the fp32 weights "
            "(*optim_states.pt): copy the complete checkpoint."
        )
    states = [_optimiser_of(path) for path in optimisers]
    _require_agreement(optimisers, states)
    shapes = [{name: _sizes(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    if "fp32_flat_groups" in states[0]:
        # Stage 3: a rank's slices of all parameter groups are concatenated in order, as if of one group.
        shapes = [dict(item for group in shapes for item in group.items())]
        slices = [[_tensors_in(state["fp32_flat_groups"]) for state in states]]
    else:
        # Stages 1 and 2: all ranks' slices of a group are concatenated, as if they were of one rank.
        parts = [state["single_partition_of_fp32_groups"] for state in states]
        slices = [[[part[group] for part in parts]] for group in range(len(shapes))]
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    for names, per_rank in zip(shapes, slices, strict=True):
        makers |= _makers(names, per_rank)
    return LazyTensors(makers)


def find_zero_folder(folder: Path) -> Path | None:
    """Find the folder `global_stepN` of a checkpoint.

    Args:
        folder: a folder `global_stepN`, or the folder of a training run that contains such folders. If there
            are several, the one that DeepSpeed's file `latest` names is used.

    Returns:
        The folder, or None if `folder` contains no checkpoint of DeepSpeed.

    Raises:
        ModelError: `latest` names a missing folder, or the choice between several folders is ambiguous.
    """
    if any(folder.glob("*model_states.pt")):
        return folder
    steps = sorted(path.parent for path in folder.glob("*/*model_states.pt"))
    latest = folder / "latest"
    if latest.is_file():
        named = folder / latest.read_text(errors="replace", encoding="utf-8").strip()
        if steps and named not in steps:
            raise ModelError(
                f"{latest} names {named.name}, which is missing: copy it too, or give the folder of another "
                f"checkpoint, such as {steps[-1]}."
            )
        return named if named in steps else None
    if len(set(steps)) > 1:
        raise ModelError(
            f"{folder} holds {len(set(steps))} checkpoints and no file `latest`: "
            f"give the folder of one of them, such as {steps[-1]}."
        )
    return steps[0] if steps else None


def _optimiser_of(path: Path) -> dict[str, Any]:
    """Read the optimiser's state from one rank's file; refuse a file that contains none."""
    content = read_pickle(path, _ALLOWED)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or _slices_of(state) not in state:
        raise ModelError(
            f"{path} holds no fp32 weights of ZeRO: it is not an optimiser shard of a DeepSpeed checkpoint; "
            "copy the complete checkpoint again."
        )
    return state


def _sizes(shape: Any) -> tuple[int, ...]:
    """Return a weight's shape as integers.

    Raises:
        TypeError: the shape is something else.
    """
    if not isinstance(shape, tuple | list) or not all(type(size) is int and size >= 0 for size in shape):
        raise TypeError(f"a shape is {shape}")
    return tuple(shape)


def _slices_of(state: dict[str, Any]) -> str:
    """Return the key of the fp32 slices in an optimiser's state: stage 3 has its own key."""
    return "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"


def _tensors_in(slices: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists. How deep the lists are nested depends on the stage."""
    if isinstance(slices, torch.Tensor):
        return [slices]
    if not isinstance(slices, list | tuple):
        raise TypeError(f"{type(slices).__name__} instead of tensors")
    return [tensor for part in slices for tensor in _tensors_in(part)]


def _require_agreement(paths: list[Path], states: list[dict[str, Any]]) -> None:
    """Refuse shards that do not come from the same step of the same training."""

    def traits(state: dict[str, Any]) -> dict[str, Any]:
        kind = _slices_of(state)
        parts = _tensors_in(state[kind])
        # In stages 1 and 2 the last ranks' slices are written without padding, so their sizes may differ.
        sizes = [part.numel() for part in parts] if kind == "fp32_flat_groups" else len(parts)
        steps = sorted(_steps_in(state.get("base_optimizer_state")))
        return {"ZeRO stage": kind, "sizes": sizes, "step": steps}

    first = traits(states[0])
    for path, state in zip(paths[1:], states[1:], strict=True):
        differing = [name for name, value in traits(state).items() if value != first[name]]
        if differing:
            raise ModelError(
                f"{path.name} and {paths[0].name} in {path.parent} are not from the same checkpoint "
                f"({', '.join(differing)} differ): copy all shards of one step of the training."
            )


def _steps_in(state: Any) -> set[float]:
    """Collect the step counts anywhere in an optimiser's state."""
    if isinstance(state, dict):
        own = {float(state["step"])} if isinstance(state.get("step"), int | float | torch.Tensor) else set()
        return own.union(*(_steps_in(value) for key, value in state.items() if key != "step"))
    return set().union(*(_steps_in(value) for value in state)) if isinstance(state, list | tuple) else set()


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """List the files that match, sorted by the rank in their names: rank 10 comes after rank 9."""

    def rank(path: Path) -> int:
        match = re.search(r"pp_rank_(\d+)", path.name)
        return int(match[1]) if match else 0

    return sorted(folder.glob(pattern), key=rank)


def _stage_0(model: dict[str, Any]) -> LazyTensors:
    weights = model["module"]
    # `module` lists a tied weight under each of its names, and frozen weights too. The key `trained_weights`,
    # if the training program has added it, lists each trained weight once, in the optimiser's order.
    # DeepSpeed itself does not write it.
    names = [n for group in model.get("trained_weights") or [] for n in group]
    names = names or [n for n in weights if n not in model["buffer_names"]]
    masters = (model["optimizer"] or {}).get("fp32_groups")
    if masters is None:
        half = next((weights[n].dtype for n in names if weights[n].dtype != torch.float32), None)
        if half:
            dtype = str(half).removeprefix("torch.")
            log_line(f"note: the checkpoint has no fp32 weights; its {dtype} weights are converted instead")
        return LazyTensors({name: weights[name].float for name in names})
    flat = _tensors_in(masters)
    if [tuple(t.shape) for t in flat] != [tuple(weights[n].shape) for n in names]:
        raise ModelError(
            "The checkpoint's fp32 weights do not match its half-precision ones in number or shape: "
            "train again."
        )
    return LazyTensors({name: tensor.float for name, tensor in zip(names, flat, strict=True)})


def _makers(
    shapes: dict[str, tuple[int, ...]], ranks: list[list[torch.Tensor]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a function for each weight that assembles it, keyed by the weight's name.

    Args:
        shapes: the weights' shapes, keyed by name, in the order of the values.
        ranks: for each rank, the tensors whose concatenation has the rank's slices of all weights. Each
            weight takes the same number of values on every rank: its size divided by the number of ranks,
            rounded up.
    """
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    offset = 0
    for name, shape in shapes.items():
        makers[name] = partial(_assemble, ranks, offset, shape)
        offset += -(-math.prod(shape) // len(ranks))  # `-(-a // b)` rounds up
    found = min(sum(part.numel() for part in parts) for parts in ranks)
    # Padding may add values, but a complete checkpoint never has fewer than its weights need.
    if found < offset:
        raise ModelError(
            f"A part of the checkpoint holds {found:,} values instead of at least {offset:,}: the checkpoint "
            "is incomplete; copy it again."
        )
    return makers


def _assemble(ranks: list[list[torch.Tensor]], offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Assemble a weight whose slices begin at `offset` on each rank, and remove the padding at its end."""
    size = math.prod(shape)
    slice_size = -(-size // len(ranks))  # rounded up
    pieces = [piece for parts in ranks for piece in _pieces(parts, offset, slice_size)]
    return torch.cat(pieces)[:size].view(shape)


def _pieces(slices: Sequence[torch.Tensor], start: int, size: int) -> list[torch.Tensor]:
    """Return views of `size` values from `start` on, counted through all tensors as if concatenated."""
    pieces, end = [], start + size
    # `start` and `end` count from the beginning of the current tensor. A negative `start` means that the
    # values began in an earlier tensor.
    for part in slices:
        if start < part.numel() and end > 0:
            pieces.append(part.flatten()[max(start, 0) : end])
        start, end = start - part.numel(), end - part.numel()
    return pieces
