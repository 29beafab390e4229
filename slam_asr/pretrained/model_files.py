"""The files of a pretrained model: which ones transformers needs, and the digest of the weights."""

import contextlib
import json
from fnmatch import fnmatch
from pathlib import Path

from slam_asr.errors import ModelError
from slam_asr.storage import digest, sha256_of_file, write_json

DIGESTS = ".weights-sha256.json"
"""File in a model's folder that caches the digest of the weights, so that gigabytes are not read again."""

_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]


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
    """Whether a folder has a configuration, all weights, and a tokenizer or preprocessor."""
    return (
        (folder / "config.json").is_file()
        and bool(weight_files(folder))
        and any(
            (folder / f).is_file()
            for f in ("preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
        )
    )


def weight_files(folder: Path) -> list[Path]:
    """List the files with a model's weights: safetensors if it has them, else pickles.

    The list is empty if the folder has no weights, or lacks a file that the index names.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            files = [
                folder / f
                for f in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            ]
            return files if all(f.is_file() for f in files) else []
    return []


def weights_sha256(folder: Path) -> str:
    """Compute a digest of a model's weights that does not depend on the folder or the files' names.

    For a single file, it is the file's SHA-256. For several files, it is a digest of their sorted SHA-256s.
    The result is cached in the folder, if that is writable, and reused while the files' sizes and
    modification times are unchanged.

    Raises:
        ModelError: the folder lacks weights.
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"{folder} lacks weights (model.safetensors, or all files of its index): fetch the model again."
        )
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    digest_file = folder / DIGESTS
    try:
        cached = json.loads(digest_file.read_text(encoding="utf-8"))
        if cached["files"] == stats:
            return cached["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    each = sorted(sha256_of_file(f) for f in files)
    sha256 = each[0] if len(each) == 1 else digest(each)
    with contextlib.suppress(OSError):
        write_json(digest_file, {"sha256": sha256, "files": stats})
    return sha256
