"""Reads and writes SLAM-LLM's `model.pt`, a pickled dictionary of the trained weights.

The projector's names begin with `encoder_projector.`. With `use_peft` the file also contains LoRA's weights,
such as `llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from slam_asr.errors import ModelError
from slam_asr.pretrained.lazy_tensors import LazyTensors, rename_tensors

FILE = "model.pt"
_PROJECTOR, _LORA = "encoder_projector.", "llm.base_model.model."


def is_slam_llm(content: object) -> bool:
    """Return whether a checkpoint's content is a mapping with the weights of SLAM-LLM's projector."""
    return isinstance(content, Mapping) and any(
        isinstance(n, str) and n.startswith(_PROJECTOR) for n in content
    )


def from_slam_llm(content: Mapping[str, torch.Tensor], where: str) -> LazyTensors:
    """Rename the weights to this project's names, `projector.…` and `llm.…`.

    Args:
        content: the weights by SLAM-LLM's names, as the file contains them.
        where: the checkpoint's file or folder, for error messages.

    Returns:
        The same tensors by their new names; shapes and dtypes do not change.

    Raises:
        ModelError: a weight belongs neither to the projector nor to LoRA.
    """
    names = {}
    for name in content:
        if name.startswith(_PROJECTOR):
            names["projector." + name.removeprefix(_PROJECTOR)] = name
        elif name.startswith(_LORA) and ".lora_" in name:
            names["llm." + name.removeprefix(_LORA)] = name
        else:
            raise ModelError(
                f"{where} holds {name}, which is neither the projector's nor a LoRA adapter's: "
                "it cannot be converted; if DeepSpeed's zero_to_fp32.py wrote it, run that with "
                "--exclude_frozen_parameters."
            )
    return rename_tensors(content, names)


def write_slam_llm(
    folder: Path, projector: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]
) -> None:
    """Write `model.pt` in SLAM-LLM's format. The file gets this name only when it is complete.

    Args:
        folder: where the file is written; it must exist.
        projector: the projector's weights, keyed by name in `SpeechProjector`.
        adapter: LoRA's weights, keyed by name in the LLM; empty if the LLM has no adapter.
    """
    content = {_PROJECTOR + n: t for n, t in projector.items()} | {_LORA + n: t for n, t in adapter.items()}
    temporary = folder / f".{FILE}.partial"
    try:
        torch.save(content, temporary)
        temporary.rename(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
