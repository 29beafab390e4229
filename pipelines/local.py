"""Run the pipeline on this machine, through kfp's own local runner.

kfp starts each step as a process or in a container, hands artifacts from one to the next, and stops at the first
failure. What is ours: the steps' lines reach the user without kfp's own (those are in `kfp.log`),
an interrupted run leaves no process behind, and the exit code of a failed step is kept.
"""

import contextlib
import fcntl
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
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from kfp import local
from kfp.local import docker_task_handler, subprocess_task_handler

from components import ALL_RESULTS
from pipelines import processes
from pipelines.docker import Containers
from pipelines.run_request import RunRequest
from slam_asr.errors import UserError
from slam_asr.progress import BAR_COLUMNS
from slam_asr.recipe import dump_recipe
from slam_asr.stage import Record, follow_pointer, read_record
from slam_asr.storage import is_s3, local_path

KFP_LOG = "kfp.log"
_EXECUTOR_PREFIX = "[KFP Executor "


class StepFailed(Exception):
    """A step ended with another exit code than 0; it has said why."""

    def __init__(self, step: "LocalStep") -> None:
        super().__init__(f"{step.name} ended with exit code {step.exit_code}")
        self.step = step


@dataclass
class LocalStep:
    """One step of a run."""

    name: str
    folder: Path
    """Where kfp keeps the step's output artifacts."""
    started: float
    """Unix time."""
    exit_code: int | None = None

    def record(self) -> Record:
        """The record of the stage's folder that the step points to."""
        return read_record(follow_pointer(self.folder / ALL_RESULTS[self.name]))


class LocalRun:
    """One run of the pipeline; results go to `store`, or `output`/store, and kfp's artifacts to `output`/steps."""

    def __init__(
        self,
        output: Path,
        voice: TextIO | None = None,
        store: str | None = None,
        containers: Containers | None = None,
    ) -> None:
        self.output = output.absolute()
        self.store = (
            store
            if store and is_s3(store)
            else str(local_path(store).absolute() if store else self.output / "store")
        )
        self.voice = voice or sys.stdout
        self.containers = containers
        self.steps: list[LocalStep] = []
        self.expected: list[str] = []

    def execute(self, wanted: RunRequest, corpus: str) -> list[LocalStep]:
        """Run all steps.

        Args:
            wanted: the pipeline, with its resolved recipe.
            corpus: an absolute path.

        Raises:
            StepFailed: a step failed.
            UserError: another run works in the same folder.
        """
        with (
            _alone_in(self.output),
            open(self.output / KFP_LOG, "w", encoding="utf-8") as log,
            tempfile.TemporaryDirectory(prefix="slam-asr-") as temporary,
            self._hooked_into_kfp(log, temporary),
        ):
            runner = local.DockerRunner() if self.containers else local.SubprocessRunner(use_venv=False)
            local.init(runner, pipeline_root=str(self.output / "steps"))
            try:
                self._run_pipeline(wanted, corpus)
            except RuntimeError:
                if failed := next((step for step in self.steps if step.exit_code), None):
                    raise StepFailed(failed) from None
                raise
        return self.steps

    def _run_pipeline(self, wanted: RunRequest, corpus: str) -> None:
        from pipelines import EVALUATION, SWEEP, TRAINING
        from pipelines.asr import asr
        from pipelines.evaluate import evaluate
        from pipelines.sweep import sweep

        self.expected = list(wanted.results)
        run = {TRAINING: asr, EVALUATION: evaluate, SWEEP: sweep}[wanted.pipeline]
        # The recipe says all; the parameter's default would only repeat it.
        run(
            recipe=dump_recipe(wanted.recipe),
            corpus=corpus,
            store=self.store,
            recipe_overrides={},
            **wanted.parameters,
        )

    def execute_only(self, stage: str, image: str, prepare: Callable[[], list[str]]) -> LocalStep:
        """Run a single stage's command line.

        Args:
            stage: its name.
            image: for containers.
            prepare: writes what the stage reads, and gives its command line; called when the folder is held.

        Raises:
            StepFailed: it failed.
            UserError: another run works in the same folder.
        """
        with _alone_in(self.output), open(self.output / KFP_LOG, "w", encoding="utf-8") as log:
            command = prepare()
            step = LocalStep(stage, self.output, time.time())
            hear = Sieve(self.voice, log).hear
            if self.containers:
                step.exit_code = self.containers.run(stage, image, command, hear)
            else:
                program = [sys.executable, "-m", "slam_asr", *command[1:]]
                step.exit_code = processes.run(program, hear, self._environment({}))
        if step.exit_code:
            raise StepFailed(step)
        return step

    @contextlib.contextmanager
    def _hooked_into_kfp(self, log: TextIO, temporary: str) -> Iterator[None]:
        """Let kfp start steps through `_run_step`, and keep its own words to the log."""

        def run_step(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
            # kfp's launcher leaves a temporary folder behind at each step: they go with ours.
            env = self._environment({"TMPDIR": temporary} | (env_vars or {}))
            return self._run_step(
                full_command, log, lambda step, hear: processes.run(full_command, hear, env)
            )

        def run_container(
            client: object, image: str, command: list[str], volumes: object, **options: Any
        ) -> int:
            environment = options.get("environment")
            return self._run_step(
                command,
                log,
                lambda step, hear: self.containers.run(step.name, image, command, hear, environment),
            )

        with (
            _replaced(subprocess_task_handler, "run_local_subprocess", run_step),
            _replaced(docker_task_handler, "run_docker_container", run_container),
            _replaced(subprocess_task_handler, "replace_python_executable", _with_this_python),
            contextlib.redirect_stdout(log),
            warnings.catch_warnings(),
        ):
            # An image's name says nothing here, where all steps run in this Python.
            warnings.filterwarnings("ignore", message=".*non-Python base image", category=RuntimeWarning)
            yield

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        """A step's environment: this one, unbuffered, with room for a progress bar where there is a terminal."""
        columns = {BAR_COLUMNS: str(shutil.get_terminal_size().columns)} if self.voice.isatty() else {}
        return os.environ | {"PYTHONUNBUFFERED": "1"} | columns | more

    def _run_step(
        self, command: list[str], log: TextIO, start: Callable[["LocalStep", Callable[[str], None]], int]
    ) -> int:
        folder = _artifact_folder(command)
        step = LocalStep(folder.name, folder, time.time())
        self.steps.append(step)
        print(
            f"\n{self.expected.index(step.name) + 1}/{len(self.expected)} {step.name}",
            file=self.voice,
            flush=True,
        )
        step.exit_code = start(step, Sieve(self.voice, log).hear)
        return step.exit_code


class Sieve:
    """Parts a step's own lines from those that kfp's executor logs around them."""

    def __init__(self, voice: TextIO, log: TextIO) -> None:
        self.voice, self.log = voice, log
        self.in_dump = False

    def hear(self, line: str) -> None:
        """Pass one line on to where it belongs."""
        ours = not self.in_dump and not (line.startswith(_EXECUTOR_PREFIX) and " INFO]: " in line)
        target = self.voice if ours else self.log
        target.write(line)
        target.flush()
        # "Got executor_input:" is followed by indented JSON; its last line is a brace alone.
        if self.in_dump:
            self.in_dump = line.rstrip("\n") != "}"
        elif not ours:
            self.in_dump = line.rstrip().endswith("Got executor_input:")


def _with_this_python(full_command: list[str], new_executable: str) -> list[str]:
    """Name the Python in the launcher's script only.

    kfp's own replaces the word in all arguments, and so breaks paths with `python3` in them.
    """
    shell, option, script, *rest = full_command
    return [shell, option, script.replace("python3", shlex.quote(new_executable)), *rest]


def _artifact_folder(command: list[str]) -> Path:
    """The folder of a step's output artifacts, from kfp's command line for it."""
    executor_input = json.loads(command[command.index("--executor_input") + 1])
    return Path(executor_input["outputs"]["outputFile"]).parent


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, function: Callable) -> Iterator[None]:
    """Put `function` in the place of `module.name` for a while."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make `folder`, and hold it for one run; two would write into each other's half-done results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made a folder ({error.strerror}): choose another --output."
        ) from error
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another run is working in {folder}: wait for it, or choose another --output."
            ) from None
        yield
