"""`python -m pipelines run`: the pipeline, or one stage of it, on this machine, as processes or in containers."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components import IMAGES_VARIABLE, STAGES, image
from pipelines import processes
from pipelines.cli import command_parser
from pipelines.run_request import RunRequest, add_pipeline_options, wanted_of
from pipelines.single import command_of_stage, corpus_of, require_stage
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.errors import EXIT_CODE, UserError
from slam_asr.recipe import dump_recipe, shipped_recipes
from slam_asr.storage import is_s3, local_path, write_atomically

if TYPE_CHECKING:
    from pipelines.docker import Containers
    from pipelines.local import LocalRun

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"


def run(arguments: list[str]) -> int:
    """Run the steps one after another, or a single stage → the exit code."""
    options = _options(arguments)
    source = options["recipe"]
    wanted = wanted_of(options, pop_recipe(options), in_a_cluster=False)
    only = require_stage(options["only"], wanted) if options["only"] else None
    output = local_path(options["output"] or Path("runs") / Path(source).stem).absolute()
    corpus = (
        str(_corpus(source, options["corpus"]))
        if only in (None, "build-manifest")
        else corpus_of(output, only)
    )
    if options["images"]:
        # kfp reads the images' names when the components are defined, that is, imported.
        os.environ[IMAGES_VARIABLE] = options["images"]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        containers = (
            stack.enter_context(_containers(options, output, wanted, corpus))
            if options["runner"] == "docker"
            else None
        )
        if code := _fetch_models(wanted):
            return code

        from pipelines.local import LocalRun, StepFailed
        from pipelines.summary import failure, summary

        local_run = LocalRun(output, store=options["store"], containers=containers)
        try:
            if only:
                _run_only(only, local_run, wanted, corpus)
                return 0
            local_run.execute(wanted, corpus)
        except StepFailed as error:
            print(f"slam-asr: {failure(error.step, output)}", file=sys.stderr)
            return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(local_run.steps, time.monotonic() - started))
    return 0


def _run_only(stage: str, local_run: "LocalRun", wanted: RunRequest, corpus: str) -> None:
    """Run one stage, fed by what the stages before it left in the run's folder."""

    def prepare() -> list[str]:
        written = local_run.output / "recipe.yaml"
        write_atomically(written, dump_recipe(wanted.recipe))
        return command_of_stage(
            stage, local_run.output, local_run.store, written, corpus, wanted.recipe, wanted.model
        )

    local_run.execute_only(stage, image(stage), prepare)


def _containers(options: dict[str, Any], output: Path, wanted: RunRequest, corpus: str) -> "Containers":
    """The Docker engine, with all folders that the steps need, and every image there.

    Raises:
        UserError: no engine, no image, or a folder that is not there.
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
    named = [corpus, wanted.recipe.data.audio_root, wanted.model, *itertools.chain(*wanted.base_models())]
    here = [Path(name).absolute() for name in named if name and not is_s3(name) and os.path.exists(name)]
    # A list of audio files names them relative to the folder that it lies in.
    containers = Containers(
        settings, str(output), writable, [path if path.is_dir() else path.parent for path in here]
    )
    stages = [options["only"]] if options["only"] else wanted.results
    containers.require_images({stage: image(stage) for stage in stages}, lambda line: print(line, flush=True))
    return containers


def _options(arguments: list[str]) -> dict[str, Any]:
    """Options of `run RECIPE …`; those of the recipe have its values where the user wrote none."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = command_parser(
        "run", "Run the steps on this machine, one after another; steps that are done are kept."
    )
    parser.add_argument("--corpus", type=str, help="folder or file of the corpus (demo brings its own)")
    add_pipeline_options(parser, in_a_cluster=False)
    parser.add_argument("--output", type=str, help="folder for all results (default: runs/RECIPE)")
    parser.add_argument(
        "--store",
        type=str,
        help="folder or s3://bucket/prefix for the stages' results, which runs may share (default: OUTPUT/store)",
    )
    parser.add_argument(
        "--runner",
        type=Literal["process", "docker"],
        default="process",
        help="steps as processes of this Python, or in containers",
    )
    parser.add_argument(
        "--only",
        type=str,
        help=f"run this stage alone, fed by what the others left in OUTPUT: {', '.join(STAGES)}",
    )
    parser.add_argument(
        "--images",
        type=str,
        help=f"docker: the steps' images, a template with {{stage}} and {{version}} or the file that `make images` writes; else {IMAGES_VARIABLE}",
    )
    parser.add_argument(
        "--network", type=str, default="host", help="docker: host, none, or the name of a network"
    )
    parser.add_argument(
        "--gpus",
        type=str,
        default="auto",
        help="docker: all, none, or a number; auto takes all that the engine has",
    )
    parser.add_argument("--shared_memory", type=str, default="8g", help="docker: size of /dev/shm")
    parser.add_argument(
        "--mounts",
        type=list[str],
        default=[],
        help="docker: more folders that the steps read, such as those of audio that a list names",
    )
    add_recipe_options(parser, arguments[0] if named else None)
    options = parse_options(parser, arguments[1:] if named else arguments)
    if not named:
        raise UserError(
            f"RECIPE is missing: python -m pipelines run RECIPE, with a file or one of {', '.join(shipped_recipes())}."
        )
    if options["recipe"] != arguments[0]:
        raise UserError(f"Two recipes are named, {arguments[0]} and {options['recipe']}: leave out --recipe.")
    return options


def _fetch_models(wanted: RunRequest) -> int:
    """Have all frozen models on this machine first: a misspelt name fails now and not hours later."""
    (encoder,), llms = wanted.base_models()
    command = [sys.executable, "-m", "slam_asr.models.pretrained", encoder, *llms]
    if sys.stdout.isatty():
        # Downloads draw their bars themselves.
        return subprocess.call(command)
    return processes.run(command, lambda line: print(line, end="", flush=True))


def _corpus(recipe: str, path: str | None) -> Path | str:
    """The corpus as an absolute path, after a look that it is there; one in object storage is looked at by its step."""
    if path and is_s3(path):
        return path
    if path:
        corpus = local_path(path).absolute()
    elif recipe == "demo":
        corpus = DEMO_CORPUS
    else:
        raise UserError(f"Recipe {recipe} brings no corpus: say where yours is with --corpus PATH.")
    if not corpus.exists():
        raise UserError(f"There is no corpus at {corpus}: check --corpus.")
    return corpus
