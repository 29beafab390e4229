"""Compare the speed of this checkout's stages with that of another checkout's.

    git worktree add ../before v0.1.0
    python benchmarks/checkouts.py ../before CORPUS         # CORPUS: a LibriSpeech tree
    python benchmarks/checkouts.py ../before CORPUS --utterances 24 --repeats 3 --stages train decode

The stages run as a user runs them, start-up included, on one part of CORPUS: build-manifest,
extract-features, train (an epoch from the shipped projector) and decode (greedy). Each stage reads results of
its own checkout. The two checkouts alternate, and swap their order in every repetition, so that a change in
the machine's load affects both. Prints the median seconds of both and the median of the ratios (above 1: this
checkout is faster), with the smallest and the largest ratio.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
RECIPE = "whisper-tiny.en-smollm2-135m"


def main() -> int:
    """Run the stages of both checkouts alternately and print their times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("corpus", type=Path, help="a LibriSpeech tree")
    parser.add_argument("--part", default="test-other", help="the part of CORPUS to use")
    parser.add_argument("--utterances", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--stages", nargs="+", default=["build-manifest", "extract-features", "train", "decode"]
    )
    options = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {stage: [] for stage in options.stages}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            checkout: _prepare(checkout, options, Path(folder) / name)
            for checkout, name in ((HERE, "this"), (options.other.resolve(), "other"))
        }
        for repeat in range(options.repeats):
            for stage in options.stages:
                order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
                times = {checkout: _timed(stage, checkout, options, sides[checkout]) for checkout in order}
                seconds[stage].append((times[HERE], times[options.other.resolve()]))
    print(f"{options.utterances} utterances, {options.repeats} repeats, {os.cpu_count()} CPUs")
    for stage, pairs in seconds.items():
        ratios = [other / this for this, other in pairs]
        print(
            f"{stage:<17} this {statistics.median(this for this, _ in pairs):7.2f} s   "
            f"other {statistics.median(other for _, other in pairs):7.2f} s   "
            f"{statistics.median(ratios):.2f} × ({min(ratios):.2f}–{max(ratios):.2f})"
        )
    return 0


def _prepare(checkout: Path, options: argparse.Namespace, folder: Path) -> Path:
    """Prepare what the stages of a checkout read: a manifest, features and a model; return `folder`."""
    _run("build-manifest", checkout, options, folder)
    for name in ("test", "train"):
        lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[: options.utterances]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run("extract-features", checkout, options, folder)
    shutil.copytree(checkout / "slam_asr" / "projectors" / RECIPE, folder / "model")
    return folder


def _timed(stage: str, checkout: Path, options: argparse.Namespace, folder: Path) -> float:
    shutil.rmtree(folder / stage, ignore_errors=True)
    started = time.perf_counter()
    _run(stage, checkout, options, folder)
    return time.perf_counter() - started


def _run(stage: str, checkout: Path, options: argparse.Namespace, folder: Path) -> None:
    test, train = folder / "test.jsonl", folder / "train.jsonl"
    # Every version of the commands understands these spellings of options and lists.
    splits = ["--data.train", "[]", "--data.dev", "[]", "--data.test", f"[{options.part}]"]
    features = ["--feature_store", folder / "extract-features"]
    arguments = {
        "build-manifest": ["--corpus", options.corpus, *splits],
        "extract-features": ["--manifests", f"[{test}]"],
        "train": [
            "--train_manifest",
            train,
            "--training.epochs",
            1,
            "--training.precision",
            "fp32",
            *features,
        ],
        "decode": ["--manifests", f"[{test}]", "--model", folder / "model", *features],
    }[stage]
    recipe = [] if stage == "decode" else ["--recipe", RECIPE]
    output = folder if stage == "build-manifest" and not test.exists() else folder / stage
    words = [sys.executable, "-m", "slam_asr", stage, "--output", output, *recipe, *arguments]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(f"{stage} failed in {checkout}:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
