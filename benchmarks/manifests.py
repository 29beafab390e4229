"""A million manifest lines: written through a sort on disk, validated, and read in any order; time and memory.

    python benchmarks/manifests.py

Each part runs in a process of its own, so that its peak of memory is its own; Python's own start and imports are in it.
"""

import argparse
import hashlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from slam_asr.manifest import Utterance, iterate_manifest, read_manifest, write_manifest

WORDS = ["the", "of", "and", "to", "a", "in", "that", "he", "was", "it", "his", "is", "with", "as", "i", "for", "had", "you", "be", "on"]


def utterances(count: int) -> Iterator[Utterance]:
    """As LibriSpeech has them, in no order: 150 characters of text, a digest, two more fields."""
    chance = random.Random(0)
    numbers = list(range(count))
    chance.shuffle(numbers)
    for number in numbers:
        speaker, chapter, utterance = number // 5000, number // 50 % 100, number % 50
        key = f"{speaker}-{chapter}-{utterance:04}"
        text = " ".join(WORDS[(number * 7 + i * i) % 20] for i in range(45))
        yield Utterance(
            key, f"/data/LibriSpeech/train/{speaker}/{chapter}/{key}.flac", text, 1 + number % 240 / 16, 16_000,
            hashlib.sha256(key.encode()).hexdigest(), {"subset": "train", "speaker": str(speaker)},
        )


def write(path: Path, count: int) -> str:
    write_manifest(path, utterances(count))
    return f"written, sorted by key ({path.stat().st_size / 1e6:.0f} MB)"


def validate(path: Path, count: int) -> str:
    manifest = read_manifest(path)
    assert len(manifest) == count
    return "validated: JSON, types, every key unique"


def stream(path: Path, count: int) -> str:
    assert sum(1 for _ in iterate_manifest(path)) == count
    return "streamed"


def pick(path: Path, count: int) -> str:
    manifest = read_manifest(path)
    chance = random.Random(1)
    started = time.perf_counter()
    for _ in range(100_000):
        manifest[chance.randrange(count)]
    return f"validated, and 100,000 lines read at random ({(time.perf_counter() - started) * 10:.1f} µs each)"


PARTS = {f.__name__: f for f in (write, validate, stream, pick)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        started = time.perf_counter()
        done = PARTS[options.part](options.path, options.lines)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(f"{options.lines:,} lines {done}: {time.perf_counter() - started:.1f} s, at most {peak:.0f} MB")
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            command = [sys.executable, __file__, "--lines", str(options.lines), "--part", part, "--path", f"{folder}/m.jsonl"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
