"""Measure the time and memory for sorting, validating and reading a manifest of a million utterances.

    python -m benchmarks.manifests                       # one million lines
    python -m benchmarks.manifests --utterances 100000 --build

Each step runs in its own process. The kernel measures the process's peak resident memory, which includes
Python and its packages. `--build` also runs the complete stage `build-manifest` on a table with as many rows.
All rows name the same short audio file, so decoding takes hardly any time.

The time for `sort` includes generating the utterances, and the time for `build` includes writing the table.
For `iterate` and `index`, the time excludes opening the manifest, but the peak memory includes it.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slam_asr.artifacts.manifest import Utterance

STEPS = ("sort", "validate", "iterate", "index")
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "that",
    "he",
    "was",
    "it",
    "his",
    "with",
    "is",
    "for",
    "as",
    "had",
    "you",
    "not",
    "be",
    "her",
    "on",
    "at",
    "by",
    "which",
    "have",
    "or",
    "from",
    "this",
    "him",
    "but",
]


def utterances(count: int) -> "Iterator[Utterance]":
    """Yield random utterances with lengths and fields like LibriSpeech's, in no particular order."""
    from slam_asr.artifacts.manifest import Utterance

    rng = random.Random(0)
    for index in range(count):
        speaker, chapter = rng.randrange(9000), rng.randrange(200_000)
        text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 60)))
        key = f"{speaker}-{chapter}-{index:07d}"
        extra = {"subset": "train-clean-360", "speaker": str(speaker), "chapter": str(chapter)}
        seconds = rng.randrange(20_000, 400_000) / 16_000
        source = f"/data/LibriSpeech/train-clean-360/{speaker}/{chapter}/{key}.flac"
        yield Utterance(key, source, text, seconds, 16_000, f"{rng.getrandbits(256):064x}", extra)


def step(name: str, folder: Path, count: int) -> None:
    """Run one step, and print its seconds and peak memory in MB."""
    from slam_asr.artifacts.manifest import manifest_line, read_manifest
    from slam_asr.runtime.external_sort import ExternalSort
    from slam_asr.storage import write_atomically

    path = folder / "manifest.jsonl"
    manifest = read_manifest(path) if name in ("iterate", "index") else None
    started = time.perf_counter()
    if name == "sort":
        with ExternalSort(folder) as ordered:
            for utterance in utterances(count):
                ordered.add(utterance.key.encode(), manifest_line(utterance))
            write_atomically(path, (line for _, line in ordered))
    elif name == "validate":
        assert len(read_manifest(path)) == count
    elif name == "iterate":
        assert sum(1 for _ in manifest) == count
    elif name == "index":
        rng = random.Random(1)
        for _ in range(100_000):
            manifest[rng.randrange(count)]
    elif name == "build":
        build(folder, count)
    seconds = time.perf_counter() - started
    print(f"{seconds:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f}")


def build(folder: Path, count: int) -> None:
    """Run `build-manifest` on a table with `count` rows."""
    import numpy as np
    import soundfile

    from slam_asr.config.recipe import load_recipe
    from slam_asr.stages.build_manifest import build_manifest

    # 0.2 s, the minimum of the demo's recipe.
    noise = np.random.default_rng(0).integers(-3000, 3000, 3200, np.int16)
    soundfile.write(folder / "a.wav", noise, 16_000)
    with open(folder / "table.csv", "w", encoding="utf-8") as table:
        table.write("id,path,text,split\n")
        table.writelines(
            f"{u.key},a.wav,{u.target},{'test' if i % 100 == 0 else 'train'}\n"
            for i, u in enumerate(utterances(count))
        )
    # The parent process parses standard output, which must not contain the stage's own lines.
    sys.stdout = sys.stderr
    build_manifest(load_recipe("demo"), str(folder / "table.csv"), str(folder / "out"))
    sys.stdout = sys.__stdout__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--build", action="store_true", help="also run the complete stage")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, help="folder for temporary files; about 1 GB per million, more with --build"
    )
    options = parser.parse_args()
    if options.step:
        step(options.step, options.folder, options.utterances)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"{options.utterances:,} utterances, {os.cpu_count()} cores")
        print(f"{'step':<10}{'seconds':>9}{'peak MB':>9}")
        for name in (*STEPS, *(["build"] if options.build else [])):
            command = [
                sys.executable,
                "-m",
                "benchmarks.manifests",
                "--step",
                name,
                "--folder",
                folder,
                "--utterances",
                str(options.utterances),
            ]
            seconds, megabytes = subprocess.run(
                command, check=True, capture_output=True, text=True, encoding="utf-8"
            ).stdout.split()
            print(f"{name:<10}{float(seconds):>9.1f}{megabytes:>9}", flush=True)
        print(f"the manifest has {(Path(folder) / 'manifest.jsonl').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
