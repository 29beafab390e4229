"""Compare a command with and without huge pages for the memory that malloc returns.

    python benchmarks/huge_pages.py
    python benchmarks/huge_pages.py --repeats 5 -- slam-asr transcribe recording.flac

Without a command, it makes six forward and backward passes like those of a small LLM: activations of 512
positions, and logits for 49,152 tokens.

The two settings alternate, so that a change in the machine's load affects both. Prints four medians for each
setting: seconds, CPU seconds, page faults, and the peak resident memory of the largest process. Then prints
how many times as fast the command is with huge pages: the median over the pairs, the lowest and the highest.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from slam_asr.runtime.environment import HUGE_PAGES, TUNABLES

WORK = "passes"
"""Argument with which this program only makes the six passes: the command that is measured by default."""


@dataclass
class Run:
    """What one run of the command took."""

    seconds: float
    cpu_seconds: float
    faults: int
    """Page faults without a disk access, of the command and its child processes."""
    peak: int
    """Peak resident memory in bytes of the largest process."""


def run(command: list[str], huge: int) -> Run:
    """Run the command with huge pages (1) or without (0).

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    # Each run has a parent of its own, because the kernel adds up the usage of all ended child processes.
    reading, writing = os.pipe()
    started = time.perf_counter()
    if not (child := os.fork()):
        environment = os.environ | {TUNABLES: f"{HUGE_PAGES}={huge}"}
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        os.write(writing, f"{usage.ru_utime + usage.ru_stime} {usage.ru_minflt} {usage.ru_maxrss}".encode())
        os._exit(1 if code else 0)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    cpu, faults, peak = os.read(reading, 200).split()
    os.close(reading)
    os.close(writing)
    if status:
        raise subprocess.CalledProcessError(1, command)
    return Run(seconds, float(cpu), int(faults), 1024 * int(peak))


def make_passes() -> None:
    """Make six passes through layers of SmolLM2-135M's sizes."""
    import torch

    inputs, first = torch.randn(512, 576), torch.randn(576, 1536, requires_grad=True)
    second, output = torch.randn(1536, 576), torch.randn(576, 49_152)
    for _ in range(6):
        hidden = torch.nn.functional.silu(inputs @ first)
        for _ in range(8):
            hidden = torch.nn.functional.silu(torch.sin(hidden) + hidden)
        (hidden @ second @ output).logsumexp(-1).sum().backward()
        first.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of pairs")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    options.command = options.command or [sys.executable, __file__, WORK]
    runs: dict[int, list[Run]] = {0: [], 1: []}
    for _ in range(options.repeats):
        for huge, made in runs.items():
            made.append(run(options.command, huge))
    print(f"{'':12} {'seconds':>9} {'CPU s':>9} {'page faults':>13} {'peak MB':>9}")
    for huge, name in ((0, "small pages"), (1, "huge pages")):
        medians = [
            statistics.median(getattr(r, field) for r in runs[huge])
            for field in ("seconds", "cpu_seconds", "faults", "peak")
        ]
        print(f"{name:12} {medians[0]:9.2f} {medians[1]:9.2f} {medians[2]:13,.0f} {medians[3] / 1e6:9.0f}")
    ratios = sorted(small.seconds / huge.seconds for small, huge in zip(runs[0], runs[1], strict=True))
    print(
        f"speed with huge pages: {statistics.median(ratios):.2f} × ({ratios[0]:.2f}, {ratios[-1]:.2f}) "
        f"that with small ones"
    )


if __name__ == "__main__":
    make_passes() if sys.argv[1:] == [WORK] else main()
