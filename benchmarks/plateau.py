"""Measure how long training runs stay on the plateau, with and without `projector.beginning`.

    python benchmarks/plateau.py data/train.jsonl                # a manifest of build-manifest
    python benchmarks/plateau.py data/train.jsonl --seeds 0 --steps 300 --beginning 200

Trains projectors from random weights, for each pair of encoder and LLM, with several seeds, with the
beginning and without. Prints the optimiser steps and the seconds until the accuracy, as a mean over 20 steps,
reaches a value at which the LLM no longer guesses. Steps and seconds of the beginning count. Time is measured
from the first step on, so it includes loading the LLM only if there is a beginning. Runs with and without it
alternate, so that a change in the machine's load affects both. This needs no network if the models are on the
machine. Features are extracted first, and that time does not count.

By default, features and training runs are in a temporary folder. With --work, they remain in that folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from slam_asr.config.recipe import load_recipe
from slam_asr.stages.extract_features import extract_features
from slam_asr.training.live import read_curve

PAIRS = (
    "openai/whisper-tiny.en+HuggingFaceTB/SmolLM2-135M-Instruct",
    "openai/whisper-base+HuggingFaceTB/SmolLM2-135M-Instruct",
)
AVERAGED = 20
"""Number of steps over which the accuracy is averaged."""
POLL = 0.05
"""Seconds between two looks at the curve of a training run."""


@dataclass
class Result:
    """One training run."""

    pair: str
    begins: bool
    seed: int
    steps: int
    """Number of steps until the accuracy was reached; if it was not, all steps of the run."""
    seconds: float
    accuracy: float
    """Mean over the last `AVERAGED` steps."""
    reached: bool


def main() -> None:
    """Print a line per training run, and a summary per pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", help="utterances to train on")
    parser.add_argument("--recipe", default="whisper-tiny.en-smollm2-135m-from-nothing")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="ENCODER+LLM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accuracy", type=float, default=0.6)
    parser.add_argument(
        "--steps", type=int, default=3000, help="maximum number, without those of the beginning"
    )
    parser.add_argument("--beginning", type=int, default=1000, help="steps of the beginning")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the recipe")
    parser.add_argument("--work", type=Path, help="folder for features and training runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        results = [
            measure(options, pair, begins, seed, work)
            for seed in options.seeds
            for pair in options.pairs
            for begins in (False, True)
        ]
    for pair in options.pairs:
        for begins in (False, True):
            summarise([r for r in results if (r.pair, r.begins) == (pair, begins)], options.accuracy)


def measure(options: argparse.Namespace, pair: str, begins: bool, seed: int, work: Path) -> Result:
    """Train until the accuracy is reached, and print a line."""
    encoder, _, llm = pair.partition("+")
    overrides = dict(assignment.split("=", 1) for assignment in options.set) | {
        "encoder.name": encoder,
        "llm.name": llm,
        "projector.beginning.kind": "ctc" if begins else "none",
        "projector.beginning.steps": options.beginning,
        "training.seed": seed,
        "training.max_steps": options.steps,
        "training.epochs": options.steps,  # enough, because an epoch has at least one step
        "training.checkpoint_every": 0,
        "training.checkpoint_minutes": 0,
        "training.log_every": 100,
    }
    of_features = {k: v for k, v in overrides.items() if k.startswith(("encoder.", "features.", "llm.name"))}
    recipe = load_recipe(options.recipe, of_features)
    features = extract_features(recipe, [options.manifest], str(work / "features")).folder
    output = work / f"{pair.replace('/', '-')}-{'with' if begins else 'without'}-{seed}"
    if output.exists():
        sys.exit(f"{output} exists already: choose another --work.")
    result = watch(start(options, overrides, features, output), output, options.accuracy)
    found = Result(pair, begins, seed, *result)
    print(json.dumps(vars(found)), flush=True)
    return found


def start(
    options: argparse.Namespace, overrides: dict[str, object], features: str, output: Path
) -> subprocess.Popen:
    """Start a training run, whose log goes to a file next to its output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "slam_asr", "train", "--recipe", options.recipe]
    command += ["--train-manifest", options.manifest, "--feature-store", features, "--output", str(output)]
    command += [f"--{key}={value}" for key, value in overrides.items()]
    with open(f"{output}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)


def watch(process: subprocess.Popen, output: Path, accuracy: float) -> tuple[int, float, float, bool]:
    """Wait until a training run reaches an accuracy, and stop it; or wait until it ends by itself.

    Returns:
        Steps, seconds, the mean accuracy of the last steps, and whether it reached `accuracy`.
    """
    curve, began, seen = output / "curve.jsonl", 0.0, -1
    while True:
        ended = process.poll() is not None
        if curve.is_file() and (size := curve.stat().st_size) != seen:
            began, seen = began or time.monotonic(), size
            rows = read_curve(curve)[0][-AVERAGED:]
            mean = statistics.fmean(row["accuracy"] for row in rows) if rows else 0.0
            if len(rows) == AVERAGED and mean >= accuracy:
                seconds = time.monotonic() - began
                process.terminate()
                process.wait()
                return rows[-1]["step"], seconds, mean, True
        elif ended:
            if process.returncode:
                sys.exit(f"The training failed: see {output}.log.")
            return rows[-1]["step"], time.monotonic() - began, mean, False
        time.sleep(POLL)


def summarise(results: list[Result], accuracy: float) -> None:
    """Print the medians of the runs of one pair, all with a beginning or all without."""
    first, reached = results[0], sum(r.reached for r in results)
    steps, seconds = (statistics.median(getattr(r, key) for r in results) for key in ("steps", "seconds"))
    print(
        f"{first.pair}, {'with' if first.begins else 'without'} a beginning: {reached} of {len(results)} "
        f"reached {accuracy}; median {steps:.0f} steps, {seconds:.0f} s"
        f"{'' if reached == len(results) else ' (those that did not reach it count with all of their steps)'}"
    )


if __name__ == "__main__":
    main()
