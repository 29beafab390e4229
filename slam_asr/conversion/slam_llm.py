"""SLAM-LLM's `model.pt`: a pickled dictionary of the trained weights.

The projector's names begin with `encoder_projector.`; with `use_peft`, LoRA's stand beside them,
`llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` and so on.
"""

from pathlib import Path

import torch

from slam_asr.errors import UserError

FILE = "model.pt"
_PROJECTOR, _LORA = "encoder_projector.", "llm.base_model.model."


def is_slam_llm(content: object) -> bool:
    """Whether a `.pt` file's content is such a dictionary."""
    return isinstance(content, dict) and any(isinstance(n, str) and n.startswith(_PROJECTOR) for n in content)


def from_slam_llm(content: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The weights under our names, `projector.…` and `llm.…`.

    Raises:
        UserError: a weight that is neither the projector's nor LoRA's.
    """
    weights = {}
    for name, tensor in content.items():
        if name.startswith(_PROJECTOR):
            weights["projector." + name.removeprefix(_PROJECTOR)] = tensor
        elif name.startswith(_LORA) and ".lora_" in name:
            weights["llm." + name.removeprefix(_LORA)] = tensor
        else:
            raise UserError(f"{where} holds {name}, which is neither the projector's nor a LoRA adapter's: it cannot be converted.")
    return weights


def write_slam_llm(folder: Path, projector: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> None:
    """Write `model.pt` as SLAM-LLM does; made aside and renamed into place."""
    content = {_PROJECTOR + n: t for n, t in projector.items()} | {_LORA + n: t for n, t in adapter.items()}
    aside = folder / f".{FILE}.partial"
    try:
        torch.save(content, aside)
        aside.rename(folder / FILE)
    finally:
        aside.unlink(missing_ok=True)
