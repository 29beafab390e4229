"""Reads the curve of a training run, and draws the page that shows it during and after the training."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slam_asr.artifacts.checkpoint import BEGINNING, CURVE, MAIN
from slam_asr.config.recipe import Recipe
from slam_asr.errors import UserError
from slam_asr.pages.curves import with_thinned_curves, write_curves
from slam_asr.progress import clock, log_line
from slam_asr.storage import join, upload
from slam_asr.training.trackers import EVENTS

PAGE = "curves.html"
REFRESH = 60.0
"""Minimum number of seconds between two versions of the page."""


class LivePage:
    """Draws the page in a thread, at most every `REFRESH` seconds, and publishes it.

    Args:
        folder: local folder of the training run, which contains its curve.
        recipe: the training run's recipe.
        published: folder in object storage to which the page is uploaded; None if the output is local.
    """

    def __init__(self, folder: Path, recipe: Recipe, published: str | None) -> None:
        self.folder, self.recipe, self.published = folder, recipe, published
        self.last = self.started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failed = False

    def refresh(self) -> None:
        """Start drawing a page, if `REFRESH` seconds have passed and the previous page is finished."""
        if time.monotonic() - self.last >= REFRESH and (self._thread is None or not self._thread.is_alive()):
            self.last = time.monotonic()
            # A daemon thread, because a failing training run must not wait for storage that hangs.
            self._thread = threading.Thread(target=self._write, name="page", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait until no page is being drawn."""
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        try:
            running = f"{clock(time.monotonic() - self.started)} so far"
            write_page(self.folder, self.recipe, [("Time", running)])
            if self.published:
                publish(self.folder, self.published)
        except (OSError, UserError) as error:
            # Storage that fails once usually fails for the next pages too, and one warning is enough.
            if not self._failed:
                log_line(
                    f"warning: the page with the curves could not be written; training continues: {error}"
                )
            self._failed = True


def publish(folder: Path, to: str) -> None:
    """Upload the page, the curve and TensorBoard's files of a running training.

    Args:
        folder: local folder of the training run.
        to: folder in object storage.

    Raises:
        StorageError: the files cannot be uploaded.
    """
    for file in (folder / PAGE, folder / CURVE, *sorted((folder / EVENTS).glob("*"))):
        if file.is_file():
            upload(file, join(to, file.relative_to(folder).as_posix()))


def write_page(folder: Path, recipe: Recipe, facts: list[tuple[str, str]]) -> dict[str, Any]:
    """Draw the page from the curve so far.

    Args:
        folder: local folder of the training run, which contains its curve.
        recipe: the training run's recipe.
        facts: rows of (label, text) to show below the models and the number of steps.

    Returns:
        The content of the page: `curve` and `validation`, both thinned, and `samples`. With a beginning, also
        `beginning`, a dictionary with the `curve` and the `validation` of the beginning.
    """
    training, validation = read_curve(folder / CURVE)
    beginning, beginning_validation = read_curve(folder / CURVE, BEGINNING)
    samples: list[dict[str, str]] = []
    for row in _rows(folder / CURVE):
        samples = row.get("samples", samples)  # the last validation that made any
    shown: dict[str, Any] = {"curve": training, "validation": validation, "samples": samples}
    if beginning:
        shown["beginning"] = {"curve": beginning, "validation": beginning_validation}
    shown = with_thinned_curves(shown)
    steps = f"{(training or beginning or [{'step': 0}])[-1]['step']:,}"
    if beginning:
        steps += f", {beginning[-1]['step']:,} of them in the beginning"
    models = ("Models", f"{recipe.encoder.name} + {recipe.llm.name}")
    rows = [models, ("Optimiser steps", steps), *facts]
    write_curves(folder / PAGE, f"{recipe.name}: training", rows, shown)
    return shown


def read_curve(path: Path, phase: str = MAIN) -> tuple[list[dict], list[dict]]:
    """Read the curve of a phase.

    Args:
        path: the curve's file.
        phase: `BEGINNING` or `MAIN`.

    Returns:
        (training points, validation points). Each point has at least `step`, `loss` and `accuracy`. In the
        beginning, the accuracy is 1 minus the token error rate.
    """
    training, validation = [], []
    for row in _rows(path):
        # Only the rows of the beginning name their phase.
        if row.pop("phase", MAIN) != phase:
            continue
        if "validation" in row:
            validation.append({"step": row["step"], **_with_nan(row["validation"])})
        else:
            training.append(_with_nan(row))
    return training, validation


def _with_nan(numbers: dict[str, Any]) -> dict[str, Any]:
    """Undo what `Monitor` does to a loss that is not finite: it writes null."""
    return numbers | {"loss": math.nan if numbers["loss"] is None else numbers["loss"]}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the last line may still be incomplete
                yield json.loads(line)
