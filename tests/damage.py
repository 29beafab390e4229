"""Damages files of weights in typical ways."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def damage(file: Path, name: str, fault: str) -> None:
    """Damage a file of weights.

    Args:
        file: file of safetensors.
        name: name of a weight with at least 6 rows and 3 columns.
        fault: `missing` removes the weight, `shape` changes its shape, `nan` puts a NaN into it, and `cut`
            truncates the file. Any other value rewrites the file unchanged.
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
