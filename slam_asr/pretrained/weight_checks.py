"""Checks a model's weight files without reading the values, so that damage is found within a second."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slam_asr.config.schema import one_sentence
from slam_asr.errors import ModelError
from slam_asr.pretrained.lazy_tensors import SAFETENSORS_NAMES
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.model_files import require_weight_files, weight_names
from slam_asr.pretrained.unpickle import read_pickle

_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Names of dtypes in the header of a safetensors file."""


def require_weights(kind: Any, folder: Path, part: str, trust_remote_code: bool = False) -> None:
    """Refuse a model whose weight files are missing, damaged, or do not fit its config.json.

    The names and shapes in safetensors files are compared with those of the model. Pickles are compared only
    when the model is loaded, because transformers would read all of their values.

    Args:
        kind: one of transformers' Auto classes.
        folder: a folder with transformers' files.
        part: `encoder` or `LLM`, for error messages.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ModelError: the model cannot be loaded.
    """
    require_sound_files(folder, part)
    if any(file.suffix == ".safetensors" for file in weight_names(folder)):
        load_weights(kind, folder, torch.float32, part, values=False, trust_remote_code=trust_remote_code)


def require_sound_files(folder: Path, part: str, may_be_absent: bool = False) -> None:
    """Refuse a quantised model, and one whose weight files are missing or damaged, or contradict the index.

    Args:
        folder: a folder with transformers' files.
        part: what the folder contains, such as `encoder`, for error messages.
        may_be_absent: whether the folder may have no weights at all, only the configuration.

    Raises:
        ModelError: a file is missing, damaged or quantised, or contradicts the index.
    """
    if may_be_absent and not any(file.is_file() for file in weight_names(folder)):
        return
    for file, expected in require_weight_files(folder, f"The {part} in {folder}").items():
        dtypes = tensor_dtypes(file)
        if dtypes is None:
            continue
        lost = next((name for name in expected or () if name not in dtypes), None)
        if lost:
            raise ModelError(
                f"{file} lacks {lost}, which the index places in it: the files are not of one model; fetch "
                "the model again."
            )
        # Buffers may be integers, but no weight is.
        integer = next((n for n, d in dtypes.items() if n.endswith("weight") and d not in _FLOATS), None)
        if integer:
            raise ModelError(
                f"{file} holds {integer} as {dtypes[integer]}, so the {part} is quantised, and quantised "
                "models cannot be used: give the model from which it was made, in bf16, fp16 or fp32."
            )


def tensor_dtypes(file: Path) -> dict[str, str] | None:
    """Return the dtype of each tensor in a safetensors file or a pickle, keyed by name.

    Returns:
        safetensors' names of the dtypes, such as `BF16`; in a pickle, dtypes that are not in
        `SAFETENSORS_NAMES` have torch's names, such as `torch.int16`. None for a pickle in the format before
        torch 1.6, which cannot be memory-mapped and is not read here.

    Raises:
        ModelError: the file is damaged, is no file of weights, or holds something other than tensors.
        PermissionError: it may not be read.
    """
    # This raises if the file may not be read; safetensors would report a missing file.
    with open(file, "rb") as content:
        first = content.read(2)
    if file.suffix == ".safetensors":
        try:
            # Opening compares the header with the file's size, so it finds every file that is cut off.
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"{file} is damaged or cut off: fetch the model again ({one_sentence(error).rstrip('.')})."
            ) from error
    # Only the format since torch 1.6, a zip file, is memory-mapped instead of read.
    if first != b"PK" and not zipfile.is_zipfile(file):
        # A pickle begins with its protocol. A pointer of Git LFS, or a web page, does not.
        if first[:1] != pickle.PROTO:
            raise ModelError(f"{file} is no file of weights: fetch the model again.")
        return None
    tensors = read_pickle(file, allowed=())
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(f"{file} holds something other than weights: fetch the model again.")
    return {name: SAFETENSORS_NAMES.get(t.dtype, str(t.dtype)) for name, t in tensors.items()}
