"""Measure the time to score many utterances and to write their report, and the report's size.

    python benchmarks/report.py --utterances 100000

The utterances are random and about as long as LibriSpeech's. One word in twenty is wrong, and there are 3
speakers per thousand utterances. Each step is timed separately, then all steps together. If `chromium` is
on the PATH, the time to lay out the page in a headless browser is printed too; it includes the browser's
start.
"""

import argparse
import itertools
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import character_errors, measure
from slam_asr.config.recipe import Recipe
from slam_asr.scoring.analysis import normalised_rows
from slam_asr.scoring.controls import empty_output, shuffled_audio
from slam_asr.scoring.report import PAGE, write_report

VOCABULARY, WORDS, ERROR_RATE = 20_000, (2, 35), 0.05


def utterances(count: int) -> list[Hypothesis]:
    """Return random utterances whose word frequencies follow Zipf's law, as in natural language."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(VOCABULARY)]
    weights = [1 / (n + 1) for n in range(VOCABULARY)]
    cumulative = list(itertools.accumulate(weights))
    rows = []
    for n in range(count):
        reference = rng.choices(words, cum_weights=cumulative, k=rng.randint(*WORDS))
        hypothesis = [rng.choice(words) if rng.random() < ERROR_RATE else word for word in reference]
        rows.append(
            Hypothesis(
                f"{n:06d}",
                " ".join(reference),
                " ".join(hypothesis),
                f"set-{n % 4}",
                str(n % max(1, count * 3 // 1000)),
                len(reference) / 2.7,  # seconds, at 2.7 words per second
            )
        )
    return rows


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Call `work`, print how many seconds it takes, and return its result."""
    started = time.perf_counter()
    result = work()
    print(f"{name:24} {time.perf_counter() - started:7.2f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=100_000)
    args = parser.parse_args()
    rows = utterances(args.utterances)
    print(f"{len(rows)} utterances, {sum(len(row.reference.split()) for row in rows)} words")
    timed("word errors", lambda: measure(rows))
    timed("character errors", lambda: character_errors(rows))
    timed("Whisper's normaliser", lambda: normalised_rows(rows))
    with tempfile.TemporaryDirectory() as folder:
        controls = {"shuffled audio": shuffled_audio(rows, 0), "empty output": empty_output(rows)}
        timed(
            "all steps and the report", lambda: write_report(Path(folder), Recipe(), rows, controls, {}, {})
        )
        page = Path(folder) / PAGE
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"page of {page.stat().st_size / 1e6:.2f} MB; peak memory {peak:.2f} GB")
        if shutil.which("chromium"):
            command = [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={folder}/browser",
                "--dump-dom",
            ]
            for name, url in (
                ("browser, empty page", "about:blank"),
                ("browser, the report", page.as_uri()),
            ):
                timed(
                    name,
                    lambda url=url: subprocess.run([*command, url], capture_output=True, check=True),
                )


if __name__ == "__main__":
    main()
