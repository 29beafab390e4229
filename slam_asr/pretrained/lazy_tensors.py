"""Mappings of names to tensors that are read or computed on every access and never cached.

With them, a model that is larger than memory can be converted: its tensors are read, computed and written one
by one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype → its name in the header of a safetensors file."""


class LazyTensors(Mapping[str, torch.Tensor]):
    """A mapping that makes its tensors again on every access.

    Args:
        makers: for each name, a function that returns the tensor.
    """

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    # Mapping's own implementation calls __getitem__, which would make the tensor.
    def __contains__(self, name: object) -> bool:
        return name in self._makers


def rename_tensors(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> LazyTensors:
    """Select tensors and give them other names, without reading them.

    Args:
        tensors: the tensors by their old names.
        names: new name → old name. Tensors that are not listed are left out.

    Returns:
        The selected tensors by their new names, each read from `tensors` on every access.
    """
    return LazyTensors({new: partial(tensors.__getitem__, old) for new, old in names.items()})


def join_tensors(*mappings: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Join mappings without reading their tensors. If several have the same name, the last one's is used."""
    return LazyTensors({name: partial(tensors.__getitem__, name) for tensors in mappings for name in tensors})


def lazy_tensors(files: Iterable[str | Path]) -> LazyTensors:
    """Open safetensors files without reading their tensors; the files are memory-mapped.

    Args:
        files: paths of the files. If several contain a tensor of the same name, the last file's is used.

    Returns:
        The tensors of all files by name, on the CPU, in the shapes and dtypes of the files.
    """
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        makers |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return LazyTensors(makers)


def write_one_by_one(
    path: Path, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    At most twice the size of the largest tensor is in memory. The libraries' writers cannot do this.
    safetensors' `save_file` needs all tensors at once, and huggingface_hub's `save_torch_state_dict` needs
    all tensors of a shard. The latter also considers tensors at the same address to be one shared tensor, and
    lazy tensors reuse memory. Given 16 lazy tensors of 64 MB, it read each of them three times and wrote only
    four.

    The file is written under a temporary name and renamed when it is complete. Format:
    https://huggingface.co/docs/safetensors.

    Args:
        path: the file to write.
        tensors: the values on the CPU, keyed by name. Each is accessed once and converted to the dtype of its
            entry in `like`.
        like: for each name, a tensor of the final dtype and shape, which may be on the meta device.

    Raises:
        ValueError: a tensor does not have the shape of its entry in `like`.
    """
    # Tensors with the largest elements come first. Every tensor then starts at a multiple of its element
    # size, as programs that memory-map the file require.
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces pad the header to a multiple of 8 bytes, which aligns the first tensor.
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = tensors[name].to(like[name].dtype)
                if tensor.shape != like[name].shape:
                    raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(like[name].shape)}")
                # The tensor is viewed as bytes, because numpy has no bfloat16.
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_finite(weight: torch.Tensor) -> bool:
    """Return whether a tensor of any shape contains neither NaN nor infinity."""
    # A NaN becomes both the minimum and the maximum, and an infinity becomes one of them. Unlike
    # `isfinite().all()`, this copies nothing. In half precision, checking a sum of all values takes ten times
    # as long.
    return not weight.numel() or all(bound.isfinite() for bound in torch.aminmax(weight))
