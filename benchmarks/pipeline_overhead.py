"""Measure the overhead of the local pipeline over calling the programs of its steps directly.

    python benchmarks/pipeline_overhead.py                      # the demo: minutes
    python benchmarks/pipeline_overhead.py my.yaml --corpus /data/x --repeats 5

Both methods do the same work: once from scratch, then `--repeats` times with all results in place, so that
only starting processes and passing on results remain. In the first row, the difference includes the variation
of the work itself; in the second row, it is the overhead. Run this on an idle machine.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def by_hand(recipe: str, corpus: str, output: Path) -> None:
    """Run the programs of all steps one after another."""
    manifests, features, checkpoint, model, decoded = (
        str(output / name) for name in ("manifests", "features", "checkpoint", "model", "decoded")
    )
    splits = [f"{manifests}/{split}.jsonl" for split in ("train", "dev", "test")]
    steps = {
        "build-manifest": {"recipe": recipe, "corpus": corpus, "output": manifests},
        "extract-features": {"recipe": recipe, "manifests": f"[{','.join(splits)}]", "output": features},
        "train": {
            "recipe": recipe,
            "train-manifest": splits[0],
            "dev-manifest": splits[1],
            "feature-store": features,
            "output": checkpoint,
        },
        "convert-checkpoint": {"checkpoint": checkpoint, "output": model},
        "decode": {
            "recipe": recipe,
            "model": model,
            "manifests": f"[{splits[2]}]",
            "feature-store": features,
            "output": decoded,
        },
        "score": {"recipe": recipe, "model": model, "parts": decoded, "output": str(output / "scored")},
    }
    for step, options in steps.items():
        _run("-m", "slam_asr", step, *(f"--{name}={value}" for name, value in options.items()))


def through_kfp(recipe: str, corpus: str, output: Path) -> None:
    """Run the same steps as one pipeline."""
    _run("-m", "pipelines", "run", recipe, "--corpus", corpus, "--output", str(output))


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}")


def seconds(method: Callable[[str, str, Path], None], *arguments) -> float:
    """Return the seconds that one call takes."""
    started = time.monotonic()
    method(*arguments)
    return time.monotonic() - started


def main() -> None:
    """Measure both methods, and print their seconds and the difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--corpus", default=str(CHECKOUT / "demo" / "speech"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{'':28} {'by hand':>10} {'pipeline':>10} {'difference':>10}")
    with tempfile.TemporaryDirectory() as folder:
        hand = (by_hand, options.recipe, options.corpus, Path(folder, "hand"))
        kfp = (through_kfp, options.recipe, options.corpus, Path(folder, "kfp"))
        _row("from scratch (1 run)", [seconds(*hand)], [seconds(*kfp)])
        rounds = [(seconds(*hand), seconds(*kfp)) for _ in range(options.repeats)]
        _row(f"unchanged (median of {options.repeats})", [h for h, _ in rounds], [k for _, k in rounds])


def _row(label: str, hand: list[float], kfp: list[float]) -> None:
    h, k = statistics.median(hand), statistics.median(kfp)
    print(f"{label:28} {h:8.1f} s {k:8.1f} s {k - h:+8.1f} s", flush=True)


if __name__ == "__main__":
    main()
