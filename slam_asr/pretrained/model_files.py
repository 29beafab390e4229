"""The files of a pretrained model: which ones transformers needs, and the digest of the weights."""

import contextlib
import json
from fnmatch import fnmatch
from pathlib import Path

from slam_asr.errors import ModelError
from slam_asr.storage import digest, sha256_of_file, write_json

DIGESTS = ".weights-sha256.json"
"""File in a model's folder that caches the digest of the weights, so that gigabytes are not read again."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Possible names of a single file with all weights, in the order in which transformers looks for them."""
_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "*.py"]
"""Patterns for all files but the weights. Python files are fetched, but run only with
`llm.trust_remote_code`."""


def needed_files(files: list[str], weights: bool = True) -> list[str]:
    """Select the files of a repository or bucket prefix that transformers needs.

    Args:
        files: paths relative to the model. Those in subfolders are left out: some repositories hold other
            variants of the model there.
        weights: whether weights are needed too. Pickles are selected only if the model has no safetensors.
    """
    kind = _SAFETENSORS if any(fnmatch(f, _SAFETENSORS) for f in files) else _PICKLES
    patterns = [kind, *_SMALL_FILES] if weights else _SMALL_FILES
    return [f for f in files if "/" not in f and any(fnmatch(f, p) for p in patterns)]


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a configuration, all weights, and a tokenizer or preprocessor."""
    inputs = ("preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    try:
        has_weights = bool(weight_files(folder))
    except ModelError:
        return False
    return has_weights and (folder / "config.json").is_file() and any((folder / f).is_file() for f in inputs)


def weight_files(folder: Path) -> list[Path]:
    """List the files with a model's weights: safetensors if it has them, else pickles.

    The list is empty if the folder has no weights, or lacks a file that the index names.

    Raises:
        ModelError: the index is damaged.
    """
    files = list(weight_names(folder))
    return files if all(f.is_file() for f in files) else []


def weight_names(folder: Path) -> dict[Path, list[str] | None]:
    """List the files with a model's weights, and for each the weights that the index places in it.

    Returns:
        The names of each file's weights, keyed by the file's path; None for a single file, which has no
        index. Missing files are included. Empty if the folder has neither a single file nor an index.

    Raises:
        ModelError: the index is damaged.
    """
    for single in WEIGHT_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return {folder / single: None}
        if index.is_file():
            weights = _read_index(index)
            return {
                folder / file: [name for name, its_file in weights.items() if its_file == file]
                for file in sorted(set(weights.values()))
            }
    return {}


def require_weight_files(folder: Path, what: str) -> dict[Path, list[str] | None]:
    """List the files with a model's weights as `weight_names` does, and require that all of them exist.

    Args:
        folder: the model's folder.
        what: the beginning of the error message, such as `The LLM in /models/llm`.

    Raises:
        ModelError: the folder lacks weights, or their index is damaged.
    """
    files = weight_names(folder)
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        lacks = f"{missing[0].name}, which its index names" if missing else "no model.safetensors or index"
        raise ModelError(f"{what} lacks weights ({lacks}): fetch the model again.")
    return files


def _read_index(index: Path) -> dict[str, str]:
    """Read which file holds each weight of a model that is saved in several files.

    Returns:
        Name of the weight → name of the file.

    Raises:
        ModelError: the index is damaged.
    """
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        weights = None
    if not isinstance(weights, dict) or not weights or not all(isinstance(f, str) for f in weights.values()):
        raise ModelError(
            f"{index} is damaged (no weight_map that names a file for each weight): fetch the model again."
        )
    return weights


def weights_sha256(folder: Path) -> str:
    """Compute a digest of a model's weights that does not depend on the folder or the files' names.

    For a single file, it is the file's SHA-256. For several files, it is a digest of their sorted SHA-256s.
    The result is cached in the folder, if that is writable, and reused while the files' sizes and
    modification times are unchanged.

    Raises:
        ModelError: the folder lacks weights, or their index is damaged.
    """
    files = require_weight_files(folder, str(folder))
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    digest_file = folder / DIGESTS
    try:
        cached = json.loads(digest_file.read_text(encoding="utf-8"))
        # Reading 13 GB can take a minute; a replaced file has another size or time.
        if cached["files"] == stats:
            return cached["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    # The order is that of the digests, not of the names, so renaming the files does not change the result.
    each = sorted(sha256_of_file(f) for f in files)
    sha256 = each[0] if len(each) == 1 else digest(each)
    # The folder may be read-only. Then the digest is computed each time.
    with contextlib.suppress(OSError):
        write_json(digest_file, {"sha256": sha256, "files": stats})
    return sha256
