"""Measure how the error rate falls with the hours of speech, and estimate how many hours a target needs.

    python benchmarks/learning_curve.py data/train.jsonl data/dev.jsonl features
    python benchmarks/learning_curve.py data/train.jsonl data/dev.jsonl features --shares 0.5 1 --wer

Trains the same recipe on growing parts of a manifest, each from random weights. A part consists of all
utterances of some speakers, and contains the smaller parts. Prints a line per part, with the lowest token
error rate that CTC reaches on the dev set during the first part of the training (`projector.beginning`). With
--wer, each trained model also transcribes the dev set. Then fits the power law

    error rate = a · hours ^ -b

and prints the hours at which it reaches each target. Such an estimate assumes that further speech is like the
speech of the manifest. Varied copies of an utterance count as hours, too.

All trainings take the same number of steps: `projector.beginning.steps`, and then `training.max_steps`, which
the recipe must set. `training.epochs` is overridden. Without --wer, only the first part is evaluated: shorten
the rest with `--set training.max_steps=1`. The manifest must name the speakers, and the feature store must
have all utterances. No network is needed if the models are on the machine.

Training runs are written to a temporary folder, which is removed at the end. With --work FOLDER, they are
written to FOLDER and remain there.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slam_asr.artifacts.checkpoint import BEGINNING
from slam_asr.artifacts.manifest import Utterance, manifest_line, read_manifest
from slam_asr.training.live import read_curve


@dataclass
class Result:
    """One training run."""

    hours: float
    speakers: int
    utterances: int
    train_loss: float
    """CTC's loss per token on the train set, as a mean over the last logged steps of the beginning."""
    token_error_rate: float
    """The lowest on the dev set, in percent."""
    wer: float | None
    """On the dev set, in percent, after the complete training; None without --wer."""


def main() -> None:
    """Print a line per training run, and the fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", help="manifest of the utterances to train on")
    parser.add_argument("dev", help="manifest of utterances of other speakers")
    parser.add_argument("features", help="feature store with all of these utterances")
    parser.add_argument("--recipe", default="whisper-base-smollm2-135m-from-nothing")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument(
        "--targets", nargs="+", type=float, default=[25.0, 12.0], help="error rates in percent"
    )
    parser.add_argument("--wer", action="store_true", help="also transcribe the dev set with each model")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe to override"
    )
    parser.add_argument("--work", type=Path, help="folder for the training runs")
    options = parser.parse_args()
    utterances = list(read_manifest(options.train))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        results = [
            measure(options, part_of(utterances, share), work / f"{share:g}") for share in options.shares
        ]
    summarise("token error rate", results, [r.token_error_rate for r in results], options.targets)
    if options.wer:
        summarise("WER", results, [r.wer or math.nan for r in results], options.targets)


def part_of(utterances: list[Utterance], share: float) -> list[Utterance]:
    """Return all utterances of the first speakers that together have this share of the audio, or a bit more.

    The order of the speakers is random but always the same.
    """
    seconds: dict[str, float] = {}
    for utterance in utterances:
        seconds[utterance.speaker] = seconds.get(utterance.speaker, 0.0) + (utterance.duration or 0.0)
    chosen: set[str] = set()
    for speaker in sorted(seconds, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(seconds[name] for name in chosen) >= share * sum(seconds.values()) - 1e-6:
            break
        chosen.add(speaker)
    return [utterance for utterance in utterances if utterance.speaker in chosen]


def measure(options: argparse.Namespace, part: list[Utterance], folder: Path) -> Result:
    """Train on a part of the manifest, and print a line."""
    if folder.exists():
        sys.exit(f"{folder} exists already: choose another --work.")
    folder.mkdir(parents=True)
    manifest, run = folder / "train.jsonl", folder / "run"
    manifest.write_bytes(b"".join(map(manifest_line, part)))
    keys = [f"--{assignment}" for assignment in options.set]
    places = ["--train-manifest", str(manifest), "--dev-manifest", options.dev]
    places += ["--feature-store", options.features, "--output", str(run)]
    # So many epochs that only `training.max_steps` ends the training.
    slam_asr(folder, "train", "--recipe", options.recipe, *places, "--training.epochs=100000", *keys)
    training, validation = read_curve(run / "curve.jsonl", BEGINNING)
    if not validation:
        sys.exit("No validation of the beginning: set projector.beginning.kind=ctc, or validate more often.")
    wer = word_error_rate(options, run, folder) if options.wer else None
    found = Result(
        round(sum(u.duration or 0.0 for u in part) / 3600, 3),
        len({u.speaker for u in part}),
        len(part),
        round(float(np.mean([row["loss"] for row in training[-5:]])), 3),
        round(100 * (1 - max(row["accuracy"] for row in validation)), 2),
        wer,
    )
    print(json.dumps(asdict(found)), flush=True)
    return found


def word_error_rate(options: argparse.Namespace, run: Path, folder: Path) -> float:
    """Transcribe the dev set with a trained model, and return the WER in percent."""
    model, parts, scored = (str(folder / name) for name in ("model", "decoded", "scored"))
    slam_asr(folder, "convert-checkpoint", "--checkpoint", str(run), "--output", model)
    places = ["--manifests", options.dev, "--feature-store", options.features]
    slam_asr(folder, "decode", "--model", model, *places, "--output", parts)
    slam_asr(folder, "score", "--model", model, "--parts", parts, "--output", scored)
    return json.loads((folder / "scored" / "wer.json").read_text(encoding="utf-8"))["all"]["wer"]


def slam_asr(folder: Path, command: str, *arguments: str) -> None:
    """Run a step, with its log in a file; end this program if the step fails."""
    with open(folder / f"{command}.log", "w", encoding="utf-8") as log:
        line = [sys.executable, "-m", "slam_asr", command, *arguments]
        if subprocess.run(line, stdout=log, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"slam-asr {command} failed: see {log.name}.")


def summarise(name: str, results: list[Result], rates: list[float], targets: list[float]) -> None:
    """Fit the power law to the results, and print the hours that it gives for each target."""
    if len(results) < 2:
        return
    slope, offset = np.polyfit(np.log([r.hours for r in results]), np.log(rates), 1)
    print(f"{name} = {math.exp(offset):.1f} % · hours ^ {slope:.3f}")
    for target in targets:
        hours = math.exp((math.log(target) - offset) / slope) if slope < 0 else math.inf
        print(f"  {target:g} % at {hours:.1f} h")


if __name__ == "__main__":
    main()
