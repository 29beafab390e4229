"""Progress of long operations: a bar in a terminal, occasional plain lines elsewhere."""

import os
import sys
import time

from tqdm import tqdm

PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines: often enough to show progress, but a day's log remains readable."""

BAR_COLUMNS = "SLAM_ASR_BAR_COLUMNS"
"""Environment variable: a terminal's width in columns, for a process that writes to it through a pipe."""


def log_line(line: str) -> None:
    """Print one line of a stage's log at once, without breaking a progress bar on the screen."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Meter:
    """A progress display.

    In a terminal it is tqdm's bar. Elsewhere it prints a line every `PLAIN_INTERVAL` seconds and one at the
    end, so that a log in a file or in a dashboard remains readable.

    Args:
        label: what is in progress.
        total: number of items; unknown if not given.
        unit: what an item is called, such as `utt`.
        plain_lines: whether to print lines outside a terminal; false for callers that print their own.
    """

    def __init__(
        self, label: str, total: int | None = None, unit: str = "it", plain_lines: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.plain_lines = label, total, unit, plain_lines
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.note = ""
        self.bar = _bar(label, total, unit)

    def update(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more items as done. A `note`, such as losses, is shown after the counts."""
        self.done += amount
        self.note = note or self.note
        if self.bar is not None:
            if note:
                # `bar.update` redraws the bar, at most ten times a second; a refresh here would redraw it at
                # every call.
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif self.plain_lines and time.monotonic() - self.last_line >= PLAIN_INTERVAL:
            self._line()

    @property
    def eta(self) -> str:
        """Estimated time to the end at the average rate so far, or an empty string if unknown."""
        if not self.total or not self.done:
            return ""
        return clock((self.total - self.done) * (time.monotonic() - self.started) / self.done)

    def _line(self) -> None:
        self.last_line = time.monotonic()
        rate = self.done / max(self.last_line - self.started, 1e-9)
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        fields = [f"{self.label}: {count} {self.unit}", f"{rate:.1f} {self.unit}/s"]
        if self.total and self.done < self.total:
            fields.append(f"ETA {self.eta}")
        if self.note:
            fields.append(self.note)
        log_line(", ".join(fields))

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.plain_lines and self.done:
            self._line()


def _bar(label: str, total: int | None, unit: str) -> tqdm | None:
    """Return tqdm's bar if the output reaches a terminal, else None."""
    columns = os.environ.get(BAR_COLUMNS)
    if not columns and not sys.stderr.isatty():
        return None
    width = {"ncols": int(columns)} if columns else {"dynamic_ncols": True}
    return tqdm(total=total, desc=label, unit=unit, **width)


def clock(seconds: float) -> str:
    """Format seconds as on a clock: 75 as `1:15`, 4000 as `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
