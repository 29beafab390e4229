"""Where else the numbers of a training go: TensorBoard's event files, and MLflow or Weights & Biases where they are asked for.

MLflow and W&B are no dependencies: `pip install mlflow-skinny` or `pip install wandb` where they are used.
Both find their server and account by their own environment variables.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

from slam_asr.errors import UserError
from slam_asr.progress import log_line

PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
EVENTS = "tensorboard"
"""Folder of TensorBoard's event files."""


class Tracker(Protocol):
    """Takes the numbers of a training."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers as they are after `step`."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text as it is after `step`."""

    def close(self) -> None:
        """No more will come."""


def require_trackers(names: list[str]) -> None:
    """Look that what a recipe asks for is installed, before anything is loaded.

    Raises:
        UserError: a package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"training.trackers asks for {name}, whose package is not installed here: run `pip install {PACKAGES[name]}` (in an image, build it "
                "in), or leave it out."
            )


def make_trackers(
    names: list[str], folder: Path, run: str, recipe: dict[str, Any], done: int
) -> list[Tracker]:
    """TensorBoard's files, and what a recipe asks for besides.

    Args:
        names: of `training.trackers`.
        folder: of the training.
        run: its name, the same for each attempt.
        recipe: flat, by full key.
        done: steps that are behind.
    """
    makers = {"mlflow": _Mlflow, "wandb": _Wandb}
    return [
        _TensorBoard(folder / EVENTS, done),
        *[_Guarded(name, makers[name](folder, run, recipe)) for name in names],
    ]


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from tensorboardX import SummaryWriter

        # What an earlier attempt wrote beyond its checkpoint is hidden; its file, named by the second, is not written over.
        self.writer = SummaryWriter(
            str(folder), purge_step=done + 1 if done else None, filename_suffix=f".from-{done}"
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


class _Mlflow:
    def __init__(self, folder: Path, run: str, recipe: dict[str, Any]) -> None:
        # Imported by name: what images hold is read from import statements.
        self.mlflow = mlflow = importlib.import_module("mlflow")
        known = folder / "mlflow-run"
        if known.is_file():
            mlflow.start_run(run_id=known.read_text())
        else:
            started = mlflow.start_run(run_name=run)
            known.write_text(started.info.run_id)
            # Values may have 500 characters at most with some servers.
            mlflow.log_params({key: str(value)[:500] for key, value in recipe.items()})

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.mlflow.log_metrics({name.replace("/", "."): value for name, value in numbers.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.mlflow.log_text(text, f"{name}/{step:08d}.txt")

    def close(self) -> None:
        self.mlflow.end_run()


class _Wandb:
    def __init__(self, folder: Path, run: str, recipe: dict[str, Any]) -> None:
        self.wandb = wandb = importlib.import_module("wandb")
        identity = run.rpartition("/")[2][:60]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "slam-asr"),
            name=run,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=recipe,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.wandb.Html(f"<pre>{text}</pre>")}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Guarded:
    """A tracker elsewhere: what fails there is said once and does not stop the training."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker

    def _try(self, call: str, *arguments: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, call)(*arguments)
        except Exception as error:  # whatever a stranger's client raises
            log_line(
                f"warning: {self.name} takes no more numbers ({type(error).__name__}: {error}); training goes on without it"
            )
            self.tracker = None

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._try("log", step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        self._try("text", step, name, text)

    def close(self) -> None:
        self._try("close")
