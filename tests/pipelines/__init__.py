"""Tests of the pipelines, and the command that runs one on this machine."""

import sys
from pathlib import Path


def run_command(recipe: Path, corpus: Path, output: Path, *options: str) -> list[str]:
    """Return the command that runs a recipe's pipeline on this machine."""
    places = ["--corpus", str(corpus), "--output", str(output)]
    return [sys.executable, "-m", "pipelines", "run", str(recipe), *places, *options]
