"""DeepSpeed's checkpoints of ZeRO stages 0 to 3, put together into fp32 tensors.

The layout, as DeepSpeed 0.19 writes it below `global_stepN/`:

- stage 0: `mp_rank_00_model_states.pt` holds the weights; in half precision the fp32 masters stand
  beside them in `optimizer.fp32_groups`, in the order of the trainable weights.
- stages 1, 2: `*zero_pp_rank_R_*_optim_states.pt` of each rank holds a slice of the flattened fp32
  masters of each parameter group; `param_shapes` of the model file says what lies where.
- stage 3: every weight is cut into equal slices, one a rank, padded; each rank's slices stand one
  after the other in its `fp32_flat_groups`.

Files are read by `slam_asr.models.pickles`: the few classes of DeepSpeed's that it writes beside
tensors are replaced by inert stand-ins, any other is refused, so nothing of a stranger's file ever
runs, and DeepSpeed need not be installed. They are mapped into memory, and each tensor is put together
when it is asked for.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slam_asr.errors import UserError
from slam_asr.models.pickles import read_pickle
from slam_asr.models.tensors import LazyTensors

_ALLOWED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


def fp32_weights(folder: Path) -> LazyTensors:
    """The trained weights of a checkpoint in fp32, by name; none is in memory before it is asked for.

    Args:
        folder: `…/global_stepN`.

    Raises:
        UserError: files missing, damaged, or holding anything but tensors and DeepSpeed's own.
    """
    models = _by_rank(folder, "*model_states.pt")
    if not models:
        raise UserError(
            f"{folder} holds no DeepSpeed checkpoint (no *model_states.pt): give the folder of a training."
        )
    model = load_pickle(models[0])
    optimisers = _by_rank(folder, "*optim_states.pt")
    if not optimisers:
        return _stage_0(model)
    ranks = int(model["dp_world_size"])
    if len(optimisers) != ranks:
        raise UserError(
            f"{folder} holds {len(optimisers)} of {ranks} optimiser shards: copy the whole checkpoint."
        )
    states = [_optimiser_of(path) for path in optimisers]
    _require_agreement(optimisers, states)
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    needed = sum(math.prod(shape) for group in shapes for shape in group.values())
    if sum(part.numel() for state in states for part in _flat(state[_slices_of(state)])) < needed:
        raise UserError(
            f"{folder} holds fewer values than the {needed:,} that its weights have: it is no whole checkpoint; copy it again."
        )
    if "fp32_flat_groups" in states[0]:
        return _stage_3(shapes, states)
    return _stages_1_and_2(shapes, states)


def find_zero_folder(folder: Path) -> Path | None:
    """The `global_stepN` of a training's folder, the one that DeepSpeed's file `latest` names, or the folder itself where it is one; None if it is neither.

    Raises:
        UserError: `latest` names what is not there.
    """
    if any(folder.glob("*model_states.pt")):
        return folder
    steps = sorted(path.parent for path in folder.glob("*/*model_states.pt"))
    latest = folder / "latest"
    if latest.is_file():
        named = folder / latest.read_text(errors="replace").strip()
        if steps and named not in steps:
            raise UserError(
                f"{latest} names {named.name}, which is not there: copy it too, or give the folder of one of the others, such as {steps[-1]}."
            )
        return named if named in steps else None
    if len(set(steps)) > 1:
        raise UserError(
            f"{folder} holds {len(set(steps))} checkpoints and no file `latest`: give the folder of one of them, such as {steps[-1]}."
        )
    return steps[0] if steps else None


def _optimiser_of(path: Path) -> dict[str, Any]:
    """Of a rank; one whose file holds none is refused."""
    content = load_pickle(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or _slices_of(state) not in state:
        raise UserError(
            f"{path} holds no fp32 weights of ZeRO: it is no optimiser shard of a DeepSpeed checkpoint; copy the whole checkpoint again."
        )
    return state


def _slices_of(state: dict[str, Any]) -> str:
    return "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"


def _flat(slices: Any) -> list[torch.Tensor]:
    return (
        [slices]
        if isinstance(slices, torch.Tensor)
        else [tensor for part in slices for tensor in _flat(part)]
    )


def _require_agreement(paths: list[Path], states: list[dict[str, Any]]) -> None:
    """Refuse shards that cannot stem from one step of one training."""

    def traits(state: dict[str, Any]) -> dict[str, Any]:
        kind = _slices_of(state)
        parts = _flat(state[kind])
        # Up to stage 2 the last ranks' slices are written without their padding.
        sizes = [part.numel() for part in parts] if kind == "fp32_flat_groups" else len(parts)
        return {
            "ZeRO stage": kind,
            "sizes": sizes,
            "step": sorted(_steps_in(state.get("base_optimizer_state"))),
        }

    first = traits(states[0])
    for path, state in zip(paths[1:], states[1:], strict=True):
        differing = [name for name, value in traits(state).items() if value != first[name]]
        if differing:
            raise UserError(
                f"{path.name} and {paths[0].name} in {path.parent} are not of one checkpoint ({', '.join(differing)} differ): copy all shards of one step from "
                "the training that wrote them."
            )


def _steps_in(state: Any) -> set[float]:
    """The numbers of steps that an optimiser's state names."""
    if isinstance(state, dict):
        own = {float(state["step"])} if isinstance(state.get("step"), int | float | torch.Tensor) else set()
        return own.union(*(_steps_in(value) for key, value in state.items() if key != "step"))
    return set().union(*(_steps_in(value) for value in state)) if isinstance(state, list | tuple) else set()


def load_pickle(path: Path) -> dict[str, Any]:
    """A `.pt` file's content, without running anything in it.

    Raises:
        UserError: the file is damaged, or names a class that is not on the allow-list.
    """
    return read_pickle(path, allowed=_ALLOWED)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    def rank(path: Path) -> int:
        found = re.search(r"pp_rank_(\d+)", path.name)
        return int(found[1]) if found else 0

    return sorted(folder.glob(pattern), key=rank)


def _stage_0(model: dict[str, Any]) -> LazyTensors:
    weights = model["module"]
    # Tied weights stand in the module under each of their names, even frozen ones, among the trained once.
    trained = model.get("trained_weights")
    names = (
        [n for group in trained for n in group]
        if trained
        else [n for n in weights if n not in model["buffer_names"]]
    )
    masters = (model["optimizer"] or {}).get("fp32_groups")
    if masters is None:
        return LazyTensors({name: weights[name].float for name in names})
    flat = [tensor for group in masters for tensor in group]
    if [tuple(t.shape) for t in flat] != [tuple(weights[n].shape) for n in names]:
        raise UserError(
            "The checkpoint's fp32 weights do not match its half-precision ones in number or shape: train again."
        )
    return LazyTensors({name: tensor.float for name, tensor in zip(names, flat, strict=True)})


def _stages_1_and_2(shapes: list[dict], states: list[dict]) -> LazyTensors:
    makers = {}
    for group, names in enumerate(shapes):
        slices = [state["single_partition_of_fp32_groups"][group] for state in states]
        offset = 0
        for name, shape in names.items():
            makers[name] = partial(_of_slices, slices, offset, shape)
            offset += math.prod(shape)
    return LazyTensors(makers)


def _of_slices(slices: list[torch.Tensor], offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cat(_pieces(slices, offset, math.prod(shape))).view(shape)


def _stage_3(shapes: list[dict], states: list[dict]) -> LazyTensors:
    # All parameter groups stand one after the other in a rank's slices.
    per_rank = [_flat(state["fp32_flat_groups"]) for state in states]
    makers, offset = {}, 0
    for name, shape in (item for group in shapes for item in group.items()):
        makers[name] = partial(_of_ranks, per_rank, offset, shape)
        offset += -(-math.prod(shape) // len(states))
    return LazyTensors(makers)


def _of_ranks(per_rank: list[list[torch.Tensor]], offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    slice_size = -(-size // len(per_rank))
    return torch.cat([piece for slices in per_rank for piece in _pieces(slices, offset, slice_size)])[
        :size
    ].view(shape)


def _pieces(slices: Sequence[torch.Tensor], start: int, size: int) -> list[torch.Tensor]:
    """Where `size` values from `start` on lie in tensors that stand one after the other."""
    found, end = [], start + size
    for part in slices:
        if start < part.numel() and end > 0:
            found.append(part.flatten()[max(start, 0) : end])
        start, end = start - part.numel(), end - part.numel()
    return found
