"""`python -m pipelines run`: the whole pipeline on this machine."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines import processes
from pipelines.cli import command_parser
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.errors import EXIT_CODE, UserError
from slam_asr.recipe import Recipe, dump_recipe, shipped_recipes
from slam_asr.storage import is_s3, local_path

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"


def run(arguments: list[str]) -> int:
    """Run the five steps one after another → the exit code."""
    options = _options(arguments)
    source, recipe = options["recipe"], pop_recipe(options)
    corpus = _corpus(source, options["corpus"])
    output = local_path(options["output"] or Path("runs") / Path(source).stem).absolute()
    started = time.monotonic()
    if code := _fetch_models(recipe):
        return code

    from pipelines.local import LocalRun, StepFailed
    from pipelines.summary import failure, summary

    local_run = LocalRun(output, store=options["store"])
    try:
        local_run.execute(dump_recipe(recipe), str(corpus))
    except StepFailed as error:
        print(f"slam-asr: {failure(error.step, output)}", file=sys.stderr)
        return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(local_run.steps, time.monotonic() - started))
    return 0


def _options(arguments: list[str]) -> dict[str, Any]:
    """Options of `run RECIPE …`; those of the recipe have its values where the user wrote none."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = command_parser("run", "Run the five steps on this machine, one after another; steps that are done are kept.")
    parser.add_argument("--corpus", type=str, help="folder or file of the corpus (demo brings its own)")
    parser.add_argument("--output", type=str, help="folder for all results (default: runs/RECIPE)")
    parser.add_argument("--store", type=str, help="folder or s3://bucket/prefix for the stages' results, which runs may share (default: OUTPUT/store)")
    add_recipe_options(parser, arguments[0] if named else None)
    options = parse_options(parser, arguments[1:] if named else arguments)
    if not named:
        raise UserError(f"RECIPE is missing: python -m pipelines run RECIPE, with a file or one of {', '.join(shipped_recipes())}.")
    if options["recipe"] != arguments[0]:
        raise UserError(f"Two recipes are named, {arguments[0]} and {options['recipe']}: leave out --recipe.")
    return options


def _fetch_models(recipe: Recipe) -> int:
    """Have both frozen models on this machine first: a misspelt name fails now and not hours later."""
    command = [sys.executable, "-m", "slam_asr.models.pretrained", recipe.encoder.name, recipe.llm.name]
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
