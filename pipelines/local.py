"""Runs a pipeline on this machine, through kfp's own local runner.

kfp starts each step as a process or in a container, passes artifacts from step to step, and stops at the
first failure. This module adds three things: kfp's own log lines go to `kfp.log` instead of the terminal,
an interrupted run ends all its processes, and the exit code of a failed step is available.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from kfp import local
from kfp.local import docker_task_handler, subprocess_task_handler

from pipelines import processes
from pipelines.docker import Containers
from pipelines.run_request import RunRequest
from slam_asr.artifacts.costs import PRICES
from slam_asr.artifacts.run_records import RUN
from slam_asr.artifacts.stage_record import Record, follow_pointer, read_record
from slam_asr.config.recipe import dump_recipe
from slam_asr.errors import ERROR_PREFIX, ConfigurationError, UserError
from slam_asr.progress import BAR_COLUMNS
from slam_asr.steps import EVALUATION, PUBLISHING, STEPS, SWEEP, TRAINING
from slam_asr.storage import is_s3, local_path
from slam_asr.storage.locks import exclusive_if_free

KFP_LOG = "kfp.log"
"""File in the run's folder with kfp's own log lines."""
_EXECUTOR_PREFIX = "[KFP Executor "


class StepFailed(Exception):
    """A step ended with an exit code other than 0; it has already printed the reason."""

    def __init__(self, step: "LocalStep") -> None:
        super().__init__(f"{step.name} ended with exit code {step.exit_code}")
        self.step = step


@dataclass
class LocalStep:
    """A step that ran on this machine."""

    name: str
    folder: Path
    """Folder of the step's output artifacts."""
    started: float
    """Unix time in seconds."""
    exit_code: int | None = None
    """None while the step runs."""
    error: str = ""
    """The step's own error message, without a full stop; empty if it printed none."""

    def record(self) -> Record:
        """Read the record of the result folder that the step's output points to."""
        record = read_record(follow_pointer(self.folder / STEPS[self.name].output))
        assert record is not None, "a step writes its pointer after its result folder is complete"
        return record


class LocalRun:
    """One run of a pipeline on this machine.

    kfp's artifacts go to `output`/steps; results go to `store`, by default `output`/store.

    Args:
        output: the run's folder.
        store: folder or s3:// prefix for results.
        containers: runs the steps in containers; if None, they run as processes.
    """

    def __init__(self, output: Path, store: str | None = None, containers: Containers | None = None) -> None:
        self.output = output.absolute()
        self.store = store or str(self.output / "store")
        if not is_s3(self.store):
            self.store = str(local_path(self.store).absolute())
        self.containers = containers
        # Saved now, because `sys.stdout` is redirected to kfp's log while kfp runs.
        self.terminal = sys.stdout
        self.steps: list[LocalStep] = []
        self.run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"

    def execute(self, request: RunRequest, corpus: str) -> None:
        """Run all steps; `steps` then lists them in the order in which they ran.

        Args:
            request: the pipeline, with its resolved recipe.
            corpus: absolute path or s3:// prefix.

        Raises:
            StepFailed: a step failed.
            UserError: another run is working in the same folder, or the folder cannot be created.
        """
        with (
            self._exclusive() as log,
            tempfile.TemporaryDirectory(prefix="slam-asr-") as temporary,
            self._hooked_into_kfp(list(request.results), log, temporary),
        ):
            # `use_venv` would make kfp create an environment for each step, and install packages into it.
            runner = local.DockerRunner() if self.containers else local.SubprocessRunner(use_venv=False)
            local.init(runner, pipeline_root=str(self.output / "steps"))
            from pipelines.asr import asr, asr_publishing
            from pipelines.evaluate import evaluate
            from pipelines.sweep import sweep

            pipelines = {TRAINING: asr, PUBLISHING: asr_publishing, EVALUATION: evaluate, SWEEP: sweep}
            try:
                pipelines[request.pipeline](
                    # The resolved recipe contains all overrides already.
                    recipe=dump_recipe(request.resolved_recipe),
                    recipe_overrides={},
                    corpus=corpus,
                    store=self.store,
                    **request.parameters,
                )
            # kfp raises a RuntimeError without the exit code, which `_start` has recorded.
            except RuntimeError:
                if failed := next((step for step in self.steps if step.exit_code), None):
                    raise StepFailed(failed) from None
                raise

    def execute_only(self, stage: str, image: str, prepare: Callable[[], list[str]]) -> None:
        """Run the command line of a single stage.

        Args:
            stage: name of the stage.
            image: image to run it in, if in a container.
            prepare: writes the stage's inputs and returns its command line; called while this run has the
                lock.

        Raises:
            StepFailed: the stage failed.
            UserError: another run is working in the same folder, or the folder cannot be created.
        """
        with self._exclusive() as log:
            program, *arguments = prepare()
            words = [program] if self.containers else [sys.executable, "-m", "slam_asr"]
            step = LocalStep(stage, self.output, time.time())
            if self._start(step, image, [*words, *arguments], {}, log):
                raise StepFailed(step)

    @contextlib.contextmanager
    def _hooked_into_kfp(self, step_names: list[str], log: TextIO, temporary: str) -> Iterator[None]:
        """Make kfp start steps through `_start`, and redirect its own messages to the log.

        kfp has no hook for either, so its functions are replaced while the block runs.
        """

        def run(command: list[str], image: str, environment: dict[str, str]) -> int:
            folder = _artifact_folder(command)
            step = LocalStep(folder.name, folder, time.time())
            self.steps.append(step)
            number = step_names.index(step.name) + 1
            print(f"\n{number}/{len(step_names)} {step.name}", file=self.terminal, flush=True)
            return self._start(step, image, command, environment, log)

        def run_process(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
            # kfp's launcher never removes its temporary folder, so it gets one that `execute` removes.
            return run(full_command, "", {"TMPDIR": temporary} | (env_vars or {}))

        def run_container(
            client: object, image: str, command: list[str], volumes: object, **options: Any
        ) -> int:
            # kfp's volumes are not needed: they are in the run's folder, which `containers` mounts.
            return run(command, image, options.get("environment") or {})

        with (
            _replaced(subprocess_task_handler, "run_local_subprocess", run_process),
            _replaced(docker_task_handler, "run_docker_container", run_container),
            _replaced(subprocess_task_handler, "replace_python_executable", _use_this_python),
            contextlib.redirect_stdout(log),
            warnings.catch_warnings(),
        ):
            # kfp guesses from an image's name whether it contains Python. It warns about this project's
            # images, although they contain it.
            warnings.filterwarnings("ignore", message=".*non-Python base image", category=RuntimeWarning)
            yield

    def _start(
        self, step: LocalStep, image: str, command: list[str], environment: dict[str, str], log: TextIO
    ) -> int:
        """Run a step's command in a container of `image` or as a process, and record its exit code."""
        lines = LogFilter(self.terminal, log)
        # A container does not inherit the environment of this process.
        environment = {RUN: self.run_id, PRICES: os.environ.get(PRICES, "")} | environment
        if self.containers:
            step.exit_code = self.containers.run(step.name, image, command, lines.write, environment)
        else:
            environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
            if self.terminal.isatty():
                # The step itself writes to a pipe, so the width for its progress bars is passed on.
                environment[BAR_COLUMNS] = str(shutil.get_terminal_size().columns)
            step.exit_code = processes.run(command, lines.write, environment)
        step.error = lines.error
        return step.exit_code

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[TextIO]:
        """Create the run's folder, lock it, and open kfp's log in it.

        Two runs would overwrite each other's unfinished results. The lock ends with the process, even if it
        is killed.

        Raises:
            ConfigurationError: the folder cannot be created.
            UserError: another run has locked it.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"The folder {self.output} cannot be created ({error.strerror}): choose another --output."
            ) from error
        with exclusive_if_free(self.output / ".lock") as held:
            if not held:
                raise UserError(
                    f"Another run is working in {self.output}: wait for it, or choose another --output."
                )
            with open(self.output / KFP_LOG, "w", encoding="utf-8") as log:
                yield log


class LogFilter:
    """Separates the lines of a step from those that kfp's executor logs around them."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log = terminal, log
        self.in_dump = False
        self.error = ""
        """The latest error message of the step, without a full stop."""

    def write(self, line: str) -> None:
        """Write a line of the step to the terminal, or a line of the executor to the log."""
        from_step = not self.in_dump and not (line.startswith(_EXECUTOR_PREFIX) and " INFO]: " in line)
        if from_step and line.startswith(ERROR_PREFIX):
            self.error = line.removeprefix(ERROR_PREFIX).strip().rstrip(".")
        target = self.terminal if from_step else self.log
        target.write(line)
        target.flush()
        # "Got executor_input:" is followed by indented JSON, whose last line is a single brace.
        if self.in_dump:
            self.in_dump = line.rstrip("\n") != "}"
        elif not from_step:
            self.in_dump = line.rstrip().endswith("Got executor_input:")


def _use_this_python(full_command: list[str], new_executable: str) -> list[str]:
    """Replace `python3` with this interpreter, but only in the launcher's script.

    kfp's own version replaces it in all arguments, which breaks paths that contain `python3`.
    """
    shell, option, script, *rest = full_command
    return [shell, option, script.replace("python3", shlex.quote(new_executable)), *rest]


def _artifact_folder(command: list[str]) -> Path:
    """Return the folder of a step's output artifacts, from the command line that kfp runs."""
    executor_input = json.loads(command[command.index("--executor_input") + 1])
    return Path(executor_input["outputs"]["outputFile"]).parent


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace `module.name` with `function` within the block."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)
