"""The curve of a training, and the page that shows it while it runs and when it is over."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slam_asr.errors import UserError
from slam_asr.pages.curves import thinned, write_curves
from slam_asr.progress import clock, log_line
from slam_asr.recipe import Recipe
from slam_asr.storage import join, upload
from slam_asr.training.checkpoint import CURVE
from slam_asr.training.trackers import EVENTS

PAGE = "curves.html"
REFRESH = 60.0
"""Seconds between two pages."""


class LivePage:
    """Writes the page now and then, in a thread, and puts it where people look.

    Args:
        folder: of the training, with its curve.
        recipe: what is trained.
        published: a folder in object storage, if those who wait look there.
    """

    def __init__(self, folder: Path, recipe: Recipe, published: str | None) -> None:
        self.folder, self.recipe, self.published = folder, recipe, published
        self.last = self.started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failed = False

    def refresh(self) -> None:
        """Write it, if it is time and the one before is done."""
        if time.monotonic() - self.last >= REFRESH and (self._thread is None or not self._thread.is_alive()):
            self.last = time.monotonic()
            self._thread = threading.Thread(target=self._write, name="page", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for the one that is being written."""
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        try:
            running = f"{clock(time.monotonic() - self.started)} so far"
            write_page(self.folder, self.recipe, [("Time", running)])
            if self.published:
                publish(self.folder, self.published)
        except (OSError, UserError) as error:
            if not self._failed:
                log_line(f"warning: the page of the curves could not be written, training goes on: {error}")
            self._failed = True


def publish(folder: Path, to: str) -> None:
    """Put page, curve and TensorBoard's files of a training that runs where people look."""
    events = sorted((folder / EVENTS).glob("*")) if (folder / EVENTS).is_dir() else []
    for file in (folder / PAGE, folder / CURVE, *events):
        if file.is_file():
            upload(file, join(to, file.relative_to(folder).as_posix()))


def write_page(folder: Path, recipe: Recipe, facts: list[tuple[str, str]]) -> dict[str, Any]:
    """Draw the curves of a training as they are now.

    Returns:
        `curve`, `validation` and `samples`, thinned to what a page can show.
    """
    training, validation = read_curve(folder / CURVE)
    shown = {
        "curve": thinned(training),
        "validation": thinned(validation),
        "samples": last_samples(folder / CURVE),
    }
    models = [
        ("Models", f"{recipe.encoder.name} + {recipe.llm.name}"),
        ("Optimiser steps", f"{training[-1]['step'] if training else 0:,}"),
    ]
    write_curves(folder / PAGE, f"{recipe.name}: training", [*models, *facts], shown)
    return shown


def read_curve(path: Path) -> tuple[list[dict], list[dict]]:
    """(training points, validation points) of a curve; each point has step, loss and accuracy."""
    training, validation = [], []
    for row in _rows(path):
        if "validation" in row:
            validation.append({"step": row["step"], **row["validation"]})
        else:
            training.append(row | {"loss": math.nan if row["loss"] is None else row["loss"]})
    return training, validation


def last_samples(path: Path) -> list[dict[str, str]]:
    """The texts of the last validation that has any: key, reference and hypothesis of each."""
    found: list[dict[str, str]] = []
    for row in _rows(path):
        found = row.get("samples", found)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):  # the last one may be on its way
                yield json.loads(line)
