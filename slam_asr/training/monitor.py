"""Reports the progress of a training run: log lines, the curve as JSON lines, trackers and the live page."""

import json
import math
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from slam_asr.artifacts.checkpoint import BEGINNING, CURVE, MAIN
from slam_asr.config.recipe import Recipe
from slam_asr.pages.curves import is_number
from slam_asr.progress import Meter, log_line
from slam_asr.storage import digest
from slam_asr.training.launch import flattened
from slam_asr.training.live import LivePage, read_curve
from slam_asr.training.trackers import make_trackers
from slam_asr.training.validator import Samples

SHOWN = 3
"""Maximum number of transcripts that are logged after a validation. The page shows all transcripts."""
PLATEAU_SMOOTHING = 100
"""Approximate number of steps over which the accuracy is averaged."""
PLATEAU_RISE = 0.02
"""Smallest increase of the accuracy that counts as progress."""
PLATEAU_PATIENCE = 1000
"""Number of steps without progress after which a plateau is reported."""
SOLVED = 0.6
"""At this accuracy or above, the LLM no longer guesses without the audio."""


@dataclass
class StepNumbers:
    """The numbers of a finished optimiser step, over all processes."""

    step: int
    epoch: int
    """Number of the epoch, from 0."""
    loss: float
    """Mean loss per target token."""
    accuracy: float
    """Share of the target tokens to which the model gives the highest probability. In the beginning, 1 minus
    the token error rate of CTC's best paths."""
    learning_rate: float
    gradient_norm: float | None
    """2-norm of the gradient before clipping; None if it is not finite or not known."""
    padding: float
    """Share of the LLM positions that is padding."""
    positions: int
    """Number of LLM positions without padding."""
    audio_seconds: float


class Monitor:
    """Collects and reports the numbers of each step. Only the first process has a monitor.

    Call `enter` before the first step.

    Args:
        folder: local folder of the training run. Its curve gets further lines.
        recipe: the training run's recipe.
        done: number of steps done before the checkpoint that is resumed from; 0 for a new training run.
        device: the device whose peak memory is reported.
        published: folder in object storage to which the live page is uploaded; None if the output is local.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, done: int, device: torch.device, published: str | None
    ) -> None:
        self.log_every, self.device, self.done = recipe.training.log_every, device, done
        self.meter: Meter | None = None
        self.file: TextIO = open(folder / CURVE, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.first = done + 1
        self.plateau = Plateau()
        # A resumed training may be on a plateau already: replay the steps before the checkpoint.
        for row in read_curve(folder / CURVE)[0]:
            self.plateau.update(row["accuracy"])
        # The digest distinguishes training runs of one recipe; all attempts at one run have the same digest.
        name = f"{recipe.name}-{digest([str(folder), published])[:8]}"
        self.trackers = make_trackers(recipe.training.trackers, folder, name, flattened(asdict(recipe)), done)
        self.page = LivePage(folder, recipe, published)

    def enter(
        self, phase: str, operations: float, peak: float | None, last_step: int, total_steps: int
    ) -> None:
        """Enter a phase of the training run, at its first step or at a later one.

        Args:
            phase: name of the phase.
            operations: floating-point operations per LLM position.
            peak: nominal operations per second of all devices together; None if not known.
            last_step: last step of the phase, for the ETA. The ETA covers only this phase, because steps of
                the two phases take unequal times.
            total_steps: number of optimiser steps of the training run.
        """
        self.phase, self.operations, self.peak, self.total = phase, operations, peak, total_steps
        if self.meter:
            self.meter.__exit__()
        self.meter = Meter("train", total=last_step - self.done, unit="step", plain_lines=False)
        self.interval = _Interval(operations, peak)

    def step(self, numbers: StepNumbers) -> None:
        """Record an optimiser step; log the first, the last and every `training.log_every`-th."""
        assert self.meter is not None, "enter has been called"
        self.interval.add(numbers)
        self.done = numbers.step
        in_beginning = self.phase == BEGINNING
        row = asdict(numbers) | {"memory": self.memory()}
        self._write(row)
        losses = self._losses("", numbers.loss, numbers.accuracy)
        self.meter.update(1, losses)
        if numbers.step % self.log_every == 0 or numbers.step in (self.first, self.total):
            norm = "" if numbers.gradient_norm is None else f", gradient norm {numbers.gradient_norm:.3g}"
            log_line(
                f"step {numbers.step}/{self.total}, epoch {numbers.epoch + 1}: {losses}, "
                f"learning rate {numbers.learning_rate:.2e}{norm}, {self.interval.summary()}, "
                f"{row['memory'] / 1e9:.1f} GB, ETA {self.meter.eta}{' of the beginning' * in_beginning}"
            )
            # Trackers get the step as their horizontal axis, and rates instead of `positions` and
            # `audio_seconds`.
            group, shown = self.phase if in_beginning else "train", row | self.interval.rates()
            for replaced in ("step", "positions", "audio_seconds"):
                del shown[replaced]
            self._track(numbers.step, group, shown)
            self.interval = _Interval(self.operations, self.peak)
        # Plateaus are detected only after the beginning, in which the accuracy is another quantity.
        if not in_beginning and (plateau := self.plateau.update(numbers.accuracy)):
            log_line(plateau)
        self.page.refresh()

    def memory(self) -> int:
        """Return this process's peak memory so far in bytes: GPU memory, or host memory without a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Linux reports kibibytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def validation(self, step: int, loss: float, accuracy: float, samples: Samples | None) -> None:
        """Record a validation.

        Args:
            step: number of the step after which the model was validated.
            loss: mean loss per target token of the dev set.
            accuracy: accuracy on the dev set, as in `StepNumbers`.
            samples: transcripts of dev utterances, if any were made.
        """
        numbers = {"loss": loss, "accuracy": accuracy}
        line = f"step {step}: {self._losses('dev ', loss, accuracy)}"
        for name in ("wer", "cer"):
            if samples is not None and (rate := getattr(samples, name)) is not None:
                numbers[name] = rate
                line += f", {name.upper()} {100 * rate:.1f} % on {len(samples.texts)} dev utterances"
        self._write({"step": step, "validation": numbers, **({"samples": samples.texts} if samples else {})})
        log_line(line)
        group = f"dev-{self.phase}" if self.phase == BEGINNING else "dev"
        self._track(step, group, numbers)
        if samples is not None:
            for row in samples.texts[:SHOWN]:
                log_line(
                    f"  {row['key']}: {row['hypothesis'] or '(nothing)'}\n"
                    f"  {'ref':>{len(row['key'])}}: {row['reference']}"
                )
            text = "\n\n".join(
                f"{row['key']}\n{row['hypothesis']}\nreference: {row['reference']}" for row in samples.texts
            )
            for tracker in self.trackers:
                tracker.text(step, f"{group}/samples", text)

    def _losses(self, of: str, loss: float, accuracy: float) -> str:
        """Return loss and accuracy as text; `of` is the word before each, such as `dev `."""
        if self.phase == BEGINNING:
            return f"{of}CTC loss {loss:.4f}, {of}token error rate {1 - accuracy:.3f}"
        return f"{of}loss {loss:.4f}, {of}accuracy {accuracy:.3f}"

    def _track(self, step: int, group: str, numbers: dict[str, Any]) -> None:
        finite = {f"{group}/{name}": value for name, value in numbers.items() if is_number(value)}
        for tracker in self.trackers:
            tracker.log(step, finite)

    def _write(self, row: dict[str, Any]) -> None:
        if self.phase != MAIN:
            row = row | {"phase": self.phase}
        self.file.write(json.dumps(_without_nan(row)) + "\n")
        # A checkpoint copies this file, and the copy needs all lines up to the checkpoint's step.
        self.file.flush()

    def close(self) -> None:
        """Close the progress display, the curve, the trackers and the page."""
        if self.meter:
            self.meter.__exit__()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()
        self.page.close()


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by None, for JSON, which has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Interval:
    """Sums and rates since the last line of the log."""

    def __init__(self, operations: float, peak: float | None) -> None:
        self.operations_per_position, self.peak = operations, peak
        self.started = time.monotonic()
        self.positions = self.cells = self.audio = 0.0

    def add(self, numbers: StepNumbers) -> None:
        self.positions += numbers.positions
        # `padding` is 1 - positions / cells, where `cells` counts positions with padding.
        self.cells += numbers.positions / (1 - numbers.padding)
        self.audio += numbers.audio_seconds

    def rates(self) -> dict[str, float]:
        """Return the rates since the last line of the log, keyed by the names that trackers receive.

        `tflops` is in 10^12 operations per second; `padding` and `share_of_peak` are fractions.
        """
        seconds = time.monotonic() - self.started
        flops = self.operations_per_position * self.positions / seconds
        return {
            "positions_per_second": self.positions / seconds,
            "audio_hours_per_hour": self.audio / seconds,
            "padding": 1 - self.positions / self.cells if self.cells else 0.0,
            "tflops": flops / 1e12,
            **({"share_of_peak": flops / self.peak} if self.peak else {}),
        }

    def summary(self) -> str:
        rates = self.rates()
        share = f" ({rates['share_of_peak']:.0%} of the peak)" if self.peak else ""
        return (
            f"{rates['positions_per_second']:.0f} positions/s ({rates['padding']:.0%} padding), "
            f"{rates['tflops']:.3g} TFLOP/s{share}, {rates['audio_hours_per_hour']:.0f} h of audio per hour"
        )


class Plateau:
    """Detects the long plateau that is typical of SLAM-ASR training, so that the log can explain it.

    First the loss falls, and the accuracy rises to what the LLM can guess without the audio. Both then hardly
    change for hundreds or thousands of steps. They suddenly improve when the projector's outputs begin to
    resemble token embeddings.
    """

    def __init__(self) -> None:
        self.mean, self.weight = 0.0, 0.0
        self.best, self.since = 0.0, 0
        """Smoothed accuracy at the last progress or report, and the step of the last progress."""
        self.reported = 0
        """Length of the plateau, in steps, when it was last reported."""
        self.steps = 0
        """Number of steps in the phase `MAIN`."""

    def update(self, accuracy: float) -> str | None:
        """Add the accuracy of the next step of the phase `MAIN`.

        Args:
            accuracy: share of the target tokens to which the model gives the highest probability.

        Returns:
            A line for the log when a plateau is detected, and again each time its length has doubled;
            otherwise None.
        """
        self.steps += 1
        if not math.isfinite(accuracy):
            return None
        share = 1 / PLATEAU_SMOOTHING
        # An exponential moving average, divided by `weight` to correct its bias towards the initial zero.
        self.mean += share * (accuracy - self.mean)
        self.weight += share * (1 - self.weight)
        smooth = self.mean / self.weight
        # The first steps cannot count as a plateau: their average is still too noisy.
        if smooth > self.best + PLATEAU_RISE or self.steps <= PLATEAU_SMOOTHING:
            self.best, self.since, self.reported = max(smooth, self.best), self.steps, 0
            return None
        length = self.steps - self.since
        if smooth >= SOLVED or length < max(PLATEAU_PATIENCE, 2 * self.reported):
            return None
        self.reported, self.best = length, max(self.best, smooth)
        return (
            f"plateau: the accuracy has been about {smooth:.2f} for {length:,} steps, as if the LLM guessed "
            "without the audio. A plateau often ends suddenly, and sooner with a better encoder "
            "(WavLM-large, HuBERT) and a chat LLM. A training run with projector.beginning has hardly any "
            "plateau. If this one does not end, try more data, a longer warm-up or another learning rate, "
            "`encoder.frames: speech` if the encoder is Whisper, or transcripts in lower case; see "
            "docs/how-to/troubleshooting.md."
        )
