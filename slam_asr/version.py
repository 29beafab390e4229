"""The installed version: the line that `slam-asr --version` prints, and a digest of the code."""

import importlib.util
import os
import subprocess
from pathlib import Path

from slam_asr import __version__

COMMIT = "SLAM_ASR_COMMIT"
"""Environment variable of the images with the commit that they were built from; a + marks changed files."""


def describe_version() -> str:
    """Return one line: version, commit if known, torch's and CUDA's versions, and the number of GPUs."""
    commit = os.environ.get(COMMIT) or commit_of_checkout()
    line = f"slam-asr {__version__}" + (f" (commit {commit})" if commit else "")
    if importlib.util.find_spec("torch") is None:
        return f"{line}, no torch"
    import torch

    count = torch.cuda.device_count()
    gpus = f", {count} GPU{'s' * (count != 1)}" if torch.version.cuda else ""
    return f"{line}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}{gpus}"


def commit_of_checkout() -> str:
    """Return the commit of this checkout, with a + if files differ from it; empty without git."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return ""
    try:
        # All tags are excluded, so that the result is a commit and never the name of a tag.
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8").stdout.strip()
    except FileNotFoundError:
        return ""


def source_digest() -> str:
    """Return a SHA-256 of all Python files of the installed package, to compare two installations.

    `__version__` changes only with a release, and an image knows its commit only if `make images` built it.
    """
    from slam_asr.storage import digest

    package = Path(__file__).resolve().parent
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    # A checkout on Windows may have other line ends than an image.
    return digest([[name, (package / name).read_text(encoding="utf-8")] for name in files])
