"""How long the scores and the report of many utterances take, and how large the page is.

    python benchmarks/report.py --utterances 100000

The utterances are made up: words of LibriSpeech's lengths, one in twenty wrong, 3 speakers a thousand. Each step is timed by itself, then the
whole. With `chromium` on the PATH it also says how long the page takes from its start to having been laid out, in a browser that is headless.
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

from slam_asr.scoring.analysis import normalised_rows
from slam_asr.scoring.controls import empty_output, shuffled_audio
from slam_asr.scoring.metrics import character_errors, measure
from slam_asr.scoring.report import PAGE, write_report
from slam_asr.scoring.wer import Hypothesis

VOCABULARY, WORDS, WRONG = 20_000, (2, 35), 0.05


def utterances(count: int) -> list[Hypothesis]:
    """Made-up utterances; words are as frequent as in a language (Zipf's law)."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(VOCABULARY)]
    weights = [1 / (n + 1) for n in range(VOCABULARY)]
    cumulated = list(itertools.accumulate(weights))
    rows = []
    for n in range(count):
        spoken = chance.choices(words, cum_weights=cumulated, k=chance.randint(*WORDS))
        written = [chance.choice(words) if chance.random() < WRONG else word for word in spoken]
        rows.append(
            Hypothesis(
                f"{n:06d}",
                " ".join(spoken),
                " ".join(written),
                f"set-{n % 4}",
                str(n % max(1, count * 3 // 1000)),
                len(spoken) / 2.7,
            )
        )
    return rows


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Do it, and print the seconds that it took."""
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
        timed("all, with the report", lambda: write_report(folder, "benchmark", rows, controls, {}, {}, {}))
        page = Path(folder) / PAGE
        print(
            f"page of {page.stat().st_size / 1e6:.2f} MB; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB of memory at most"
        )
        if shutil.which("chromium"):
            command = [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={folder}/browser",
                "--dump-dom",
            ]
            for name, place in (
                ("browser, empty page", "about:blank"),
                ("browser, the report", page.as_uri()),
            ):
                timed(
                    name,
                    lambda place=place: subprocess.run([*command, place], capture_output=True, check=True),
                )


if __name__ == "__main__":
    main()
