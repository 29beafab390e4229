"""What one sees of a training: lines in the log, and the curve as JSON lines."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from slam_asr.progress import Meter, say

CURVE = "curve.jsonl"


class Monitor:
    """Collects the numbers of each step; used by one process only.

    Args:
        folder: where the curve is written.
        total_steps: of the training.
        log_every: steps between two lines of the log.
    """

    def __init__(self, folder: Path, total_steps: int, log_every: int) -> None:
        self.log_every = log_every
        self.started = time.monotonic()
        self.positions = 0
        self.file: TextIO = open(folder / CURVE, "w")  # noqa: SIM115 - closed by close()
        self.meter = Meter("train", total=total_steps, unit="step", plain_lines=False)
        self.total = total_steps

    def step(self, step: int, epoch: int, loss: float, accuracy: float, learning_rate: float, positions: int) -> None:
        """One optimiser step is done."""
        self.positions += positions
        row = {"step": step, "epoch": epoch, "loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        self._write(row)
        self.meter.update(1, f"loss {loss:.3f}, accuracy {accuracy:.3f}")
        if step % self.log_every == 0 or step in (1, self.total):
            rate = self.positions / (time.monotonic() - self.started)
            say(
                f"step {step}/{self.total}, epoch {epoch + 1}: loss {loss:.4f}, accuracy {accuracy:.3f}, "
                f"learning rate {learning_rate:.2e}, {rate:.0f} positions/s, ETA {self.meter.eta}"
            )

    def validation(self, step: int, loss: float, accuracy: float) -> None:
        """The dev set was scored after `step`."""
        self._write({"step": step, "validation": {"loss": loss, "accuracy": accuracy}})
        say(f"step {step}: dev loss {loss:.4f}, dev accuracy {accuracy:.3f}")

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Finish the display and the file."""
        self.meter.__exit__()
        self.file.close()


def read_curve(path: Path) -> tuple[list[dict], list[dict]]:
    """(training points, validation points) of a curve; each point has step, loss and accuracy."""
    training, validation = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "validation" in row:
            validation.append({"step": row["step"], **row["validation"]})
        else:
            training.append(row)
    return training, validation
