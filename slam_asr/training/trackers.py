"""Sends the numbers of a training run to TensorBoard, MLflow and Weights & Biases.

TensorBoard's files are always written. MLflow and Weights & Biases (W&B) are used on request
(`training.trackers`). They are not dependencies: to use them, run `pip install mlflow-skinny` or `pip install
wandb`. Both read their server and account from environment variables of their own.
"""

import functools
import html
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line

PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""The package to install for each tracker."""
EVENTS = "tensorboard"
"""Name of the folder with TensorBoard's event files."""


class Tracker:
    """Passes the numbers of a training run to a client, which is no longer used after a failure.

    The failure is logged.

    Args:
        name: name of the tracker, for the log.
        make: function that creates the client, which has the same three methods. It may fail too.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._client = self._try(make)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Record the numbers of a step, keyed by name. All of them are finite."""
        self._call("log", step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """Record a text of a step."""
        self._call("text", step, name, text)

    def close(self) -> None:
        """Finish the run."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        if self._client is not None:
            self._try(getattr(self._client, method), *arguments)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # a third-party client may raise anything
            # Some clients' messages have several lines.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log_line(f"warning: {self.name} failed ({reason}); training continues without it")
            self._client = None
            return None


def require_trackers(names: list[str]) -> None:
    """Check, before anything is loaded, that the packages of the trackers are installed.

    Args:
        names: `training.trackers`.

    Raises:
        ConfigurationError: a package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"training.trackers asks for {name}, whose package is not installed here: run `pip install "
                f"{PACKAGES[name]}` (for an image, add it to the build), or leave it out."
            )


def make_trackers(
    names: list[str], folder: Path, run: str, recipe: dict[str, Any], done: int
) -> list[Tracker]:
    """Create TensorBoard's tracker, and the trackers that a recipe asks for.

    Args:
        names: `training.trackers`.
        folder: local folder of the training run.
        run: name of the tracker's run, `RECIPE-DIGITS`, the same for all attempts at a training run. A
            resumed attempt continues the earlier attempt's run, which is found by the name's last digits.
        recipe: the recipe's values by full key, such as `training.seed`.
        done: number of steps done before the checkpoint that is resumed from; 0 for a new training run.
    """
    makers: dict[str, Callable[[Path, str, dict[str, Any]], Any]] = {"mlflow": _Mlflow, "wandb": _Wandb}
    return [
        Tracker("TensorBoard", lambda: _TensorBoard(folder / EVENTS, done)),
        *[Tracker(name, functools.partial(makers[name], folder, run, recipe)) for name in names],
    ]


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from tensorboardX import SummaryWriter

        # `purge_step` hides the steps that an earlier attempt logged after its last checkpoint. Without the
        # suffix, the file names of two attempts would differ only in their creation time, in whole seconds.
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


_MLFLOW_TAG = "slam_asr.training"
"""Tag of MLflow's runs by which a resumed attempt finds the earlier attempt's run."""


class _Mlflow:
    def __init__(self, folder: Path, run: str, recipe: dict[str, Any]) -> None:
        # Not an import statement: the images contain every package that such a statement names, but mlflow is
        # optional.
        self.mlflow = mlflow = importlib.import_module("mlflow")
        # The name ends with the digits that distinguish training runs. The server is searched for them,
        # because a resumed attempt may run on another machine, which has no file of the earlier one.
        identity = run.rpartition("-")[2]
        earlier = mlflow.search_runs(
            filter_string=f"tags.`{_MLFLOW_TAG}` = '{identity}'", max_results=1, output_format="list"
        )
        if earlier:
            mlflow.start_run(run_id=earlier[0].info.run_id)
        else:
            mlflow.start_run(run_name=run, tags={_MLFLOW_TAG: identity})
            # Some servers limit values to 500 characters.
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
        # W&B limits the length of an id. The name ends with the digits that distinguish training runs.
        identity = run.rpartition("/")[2][-60:]
        # With `resume="allow"` and the id of an earlier attempt, W&B continues that attempt's run.
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
        # A transcript may contain < and &.
        self.run.log({name: self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self.run.finish()
