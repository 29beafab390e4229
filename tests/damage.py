"""Files of weights, damaged in the ways that happen to them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def damage(file: Path, name: str, fault: str) -> None:
    """Leave a weight out (`missing`), give it another `shape`, put a `nan` into it, or have the file `cut` off; any other fault leaves all as it was.

    Args:
        file: safetensors.
        name: of a weight with two dimensions.
        fault: which.
    """
    weights = load_file(file)
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = weights[name][:5].contiguous()
    elif fault == "nan":
        weights[name][3, 2] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:2000])
