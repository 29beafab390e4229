"""A million utterances: how long a manifest takes to be sorted, validated and read, and in how much memory.

    python -m benchmarks.manifests                       # one million lines
    python -m benchmarks.manifests --utterances 100000 --build

Each step runs in a process of its own, whose peak of resident memory is the kernel's figure and
includes what Python and its packages take. `--build` also runs the whole stage on a table of that
many rows, all with one short file for audio: what is measured then is everything but decoding.
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


def utterances(count: int) -> Iterator:
    """Utterances as LibriSpeech has them, in no order."""
    from slam_asr.manifest import Utterance

    chance = random.Random(0)
    for index in range(count):
        speaker, chapter = chance.randrange(9000), chance.randrange(200_000)
        text = " ".join(chance.choices(WORDS, k=chance.randrange(5, 60)))
        key = f"{speaker}-{chapter}-{index:07d}"
        extra = {"subset": "train-clean-360", "speaker": str(speaker), "chapter": str(chapter)}
        seconds = chance.randrange(20_000, 400_000) / 16_000
        source = f"/data/LibriSpeech/train-clean-360/{speaker}/{chapter}/{key}.flac"
        yield Utterance(key, source, text, seconds, 16_000, f"{chance.getrandbits(256):064x}", extra)


def step(name: str, folder: Path, count: int) -> None:
    """Do one step, and print seconds and MB."""
    from slam_asr.manifest import read_manifest, write_manifest

    path = folder / "manifest.jsonl"
    manifest = read_manifest(path) if name in ("iterate", "index") else None
    started = time.perf_counter()
    if name == "sort":
        write_manifest(path, utterances(count))
    elif name == "validate":
        assert len(read_manifest(path)) == count
    elif name == "iterate":
        assert sum(1 for _ in manifest) == count
    elif name == "index":
        chance = random.Random(1)
        for _ in range(100_000):
            manifest[chance.randrange(count)]
    elif name == "build":
        build(folder, count)
    seconds = time.perf_counter() - started
    print(f"{seconds:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def build(folder: Path, count: int) -> None:
    """`build-manifest` on a table of so many rows."""
    import numpy as np
    import soundfile

    from slam_asr.corpora.build import build_manifest
    from slam_asr.recipe import load_recipe

    soundfile.write(folder / "a.wav", np.zeros(1600, np.int16), 16_000)
    with open(folder / "table.csv", "w") as table:
        table.write("id,path,text,split\n")
        table.writelines(
            f"{u.key},a.wav,{u.target},{'test' if i % 100 == 0 else 'train'}\n"
            for i, u in enumerate(utterances(count))
        )
    sys.stdout = sys.stderr
    build_manifest(load_recipe("demo"), str(folder / "table.csv"), str(folder / "out"))
    sys.stdout = sys.__stdout__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--build", action="store_true", help="run the whole stage too")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, help="where the files go; some hundred MB a million utterances"
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
                command, check=True, capture_output=True, text=True
            ).stdout.split()
            print(f"{name:<10}{float(seconds):>9.1f}{megabytes:>9}", flush=True)
        print(f"the manifest has {(Path(folder) / 'manifest.jsonl').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
