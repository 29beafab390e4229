"""Tensors by name that are read when they are asked for, and not kept: what is larger than memory passes through it one by one."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors calls them."""


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors, each of which is made anew whenever it is asked for.

    Args:
        makers: of each tensor, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def renamed(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> Tensors:
    """Some of them under other names.

    Args:
        tensors: by their old names.
        names: the old name of each new one.
    """
    return Tensors({new: partial(tensors.__getitem__, old) for new, old in names.items()})


def stored_tensors(files: Iterable[str | Path]) -> Tensors:
    """What stands in safetensors files; they are mapped into memory, not read."""
    makers = {}
    for path in files:
        file = safe_open(path, framework="pt")
        makers |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return Tensors(makers)


def write_one_by_one(
    path: Path, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> None:
    """Write a safetensors file while no more than one of its tensors is in memory; made aside and renamed into place.

    The library's own `save_file` wants all of them at once. Format: https://huggingface.co/docs/safetensors.

    Args:
        path: of the file.
        tensors: what to write.
        like: dtype and shape of each; they may be on the meta device.
    """
    # The largest items first, so that each tensor begins where its items may.
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].element_size()
        header[name] = {
            "dtype": _NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = tensors[name].to(like[name].dtype)
                if tensor.shape != like[name].shape:
                    raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(like[name].shape)}")
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
