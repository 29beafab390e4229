"""`python -m pipelines run`: run a pipeline, or one stage of it, on this machine."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components import IMAGES_VARIABLE, image
from pipelines import processes
from pipelines.cli import command_parser
from pipelines.run_request import RunRequest, add_pipeline_options, request_from_options
from pipelines.single import RUN_ALONE, command_of_stage, corpus_of, require_stage
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.config.recipe import dump_recipe, shipped_recipes
from slam_asr.errors import EXIT_CODE, ConfigurationError, InputError
from slam_asr.storage import is_s3, local_path, write_atomically

if TYPE_CHECKING:
    from pipelines.docker import Containers
    from pipelines.local import LocalRun

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"


def run(arguments: list[str]) -> int:
    """Run all steps one after another, or a single stage, and return the exit code."""
    options = _options(arguments)
    source = options["recipe"]
    request = request_from_options(options, pop_recipe(options), in_a_cluster=False)
    only = require_stage(options["only"], request) if options["only"] else None
    output = local_path(options["output"] or Path("runs") / Path(source).stem).absolute()
    corpus = (
        str(_corpus(source, options["corpus"]))
        if only in (None, "build-manifest")
        else corpus_of(output, only)
    )
    if options["images"]:
        # Components read this variable when they are imported, which has not happened yet.
        os.environ[IMAGES_VARIABLE] = options["images"]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        containers = (
            stack.enter_context(_containers(options, output, request, corpus))
            if options["runner"] == "docker"
            else None
        )
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
            print(f"slam-asr: {failure(error.step, output)}", file=sys.stderr)
            # The code for a mistake that the user can fix is passed on; any other code means a failure.
            return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(local_run.steps, time.monotonic() - started))
    return 0


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
        UserError: the engine does not answer, an image is missing, or a folder does not exist.
    """
    from pipelines.docker import Containers, Settings

    settings = Settings(options["network"], options["gpus"], options["shared_memory"], options["mounts"])
    writable = [
        output,
        *(
            [local_path(options["store"]).absolute()]
            if options["store"] and not is_s3(options["store"])
            else []
        ),
    ]
    audio_root = request.resolved_recipe.data.audio_root
    inputs = [corpus, audio_root, request.model, *itertools.chain(*request.base_models())]
    local = [Path(name).absolute() for name in inputs if name and not is_s3(name) and os.path.exists(name)]
    # A corpus may be a file that lists audio files relative to its own folder, so that folder is mounted.
    readable = [path if path.is_dir() else path.parent for path in local]
    containers = Containers(settings, str(output), writable, readable)
    stages = [options["only"]] if options["only"] else request.results
    containers.require_images({stage: image(stage) for stage in stages}, lambda line: print(line, flush=True))
    return containers


def _options(arguments: list[str]) -> dict[str, Any]:
    """Parse the options of `run RECIPE …`; the recipe's values are the defaults of its options."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = command_parser(
        "run", "Run the steps on this machine, one after another. Finished steps are reused."
    )
    parser.add_argument("--corpus", type=str, help="folder or file of the corpus (demo includes its own)")
    add_pipeline_options(parser, in_a_cluster=False)
    parser.add_argument("--output", type=str, help="folder for all results (default: runs/RECIPE)")
    parser.add_argument(
        "--store",
        type=str,
        help="folder or s3://bucket/prefix for the results of all stages; runs may share it "
        "(default: OUTPUT/store)",
    )
    parser.add_argument(
        "--runner",
        type=Literal["process", "docker"],
        default="process",
        help="run the steps as processes of this Python, or in containers",
    )
    parser.add_argument(
        "--only",
        type=str,
        help=f"run only this stage, on the earlier results in OUTPUT: {', '.join(RUN_ALONE)}",
    )
    parser.add_argument(
        "--images",
        type=str,
        help=f"docker: images of the steps, a template with {{stage}} and {{version}} or the file that "
        f"`make images` writes (default: {IMAGES_VARIABLE})",
    )
    parser.add_argument(
        "--network", type=str, default="host", help="docker: host, none, or the name of a network"
    )
    parser.add_argument(
        "--gpus",
        type=str,
        default="auto",
        help="docker: all, none, or a number; auto uses all GPUs that the engine has",
    )
    parser.add_argument("--shared-memory", type=str, default="8g", help="docker: size of /dev/shm")
    parser.add_argument(
        "--mounts",
        type=list[str],
        default=[],
        help="docker: additional folders to mount, such as those of the audio files in a list",
    )
    add_recipe_options(parser, arguments[0] if named else None)
    options = parse_options(parser, arguments[1:] if named else arguments)
    if not named:
        raise ConfigurationError(
            "RECIPE is missing: python -m pipelines run RECIPE, with a file or one of "
            f"{', '.join(shipped_recipes())}."
        )
    if options["recipe"] != arguments[0]:
        raise ConfigurationError(
            f"Two recipes are named, {arguments[0]} and {options['recipe']}: leave out --recipe."
        )
    return options


def _fetch_models(request: RunRequest) -> int:
    """Download all frozen models before the first step, so that a misspelt name fails now, not hours later.

    The steps themselves know no wheels: without the hub, they find the demo's models in the cache.

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
