"""The command line of `python -m pipelines`."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from components import DEFAULT_IMAGES, IMAGES_VARIABLE
from pipelines import processes
from slam_asr.cli import add_recipe_options, parse_options, pop_recipe
from slam_asr.errors import EXIT_CODE, UserError, exit_on_user_error
from slam_asr.recipe import Recipe, dump_recipe, nearest, shipped_recipes
from slam_asr.storage import is_s3, local_path

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"

USAGE = """usage: python -m pipelines run RECIPE [--corpus PATH] [--output DIR] [--store PATH] [--SECTION.KEY VALUE ...]
       python -m pipelines compile [--output DIR|FILE.yaml] [--images TEMPLATE]

  run       train, convert and measure on this machine, through Kubeflow's local runner
  compile   write the YAML to submit to Kubeflow Pipelines

python -m pipelines run RECIPE --help   all options, with the recipe's values
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile or run; the exit code is 0, 1 (a defect), 2 (the user's to mend) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    commands = {"run": _run, "compile": _compile}
    with processes.interruptible(), exit_on_user_error():
        if arguments[0] not in commands:
            hint = nearest(arguments[0], list(commands)) or "."
            raise UserError(f"There is no command {arguments[0]}{hint} Commands: {', '.join(commands)}.")
        return commands[arguments[0]](arguments[1:])


def _compile(arguments: list[str]) -> int:
    parser = _parser("compile", "Write the pipeline and each component as YAML; the same source gives the same bytes.")
    parser.add_argument("--output", default="build/kfp", help="a folder, or a .yaml file for the pipeline alone")
    parser.add_argument(
        "--images", default=os.environ.get(IMAGES_VARIABLE) or DEFAULT_IMAGES,
        help=f"the steps' images, with {{stage}} and {{version}}; or set {IMAGES_VARIABLE}",
    )
    options = parse_options(parser, arguments)
    # kfp reads the images' names when the components are defined, that is, imported.
    os.environ[IMAGES_VARIABLE] = options["images"]
    from pipelines.compile import compile_all

    for path in compile_all(local_path(options["output"])):
        print(path)
    return 0


def _run(arguments: list[str]) -> int:
    options = _run_options(arguments)
    source, recipe = options["recipe"], pop_recipe(options)
    corpus = _corpus(source, options["corpus"])
    output = local_path(options["output"] or Path("runs") / Path(source).stem).absolute()
    started = time.monotonic()
    if code := _fetch_models(recipe):
        return code

    from pipelines.local import LocalRun, StepFailed
    from pipelines.summary import failure, summary

    run = LocalRun(output, store=options["store"])
    try:
        run.execute(dump_recipe(recipe), str(corpus))
    except StepFailed as error:
        print(f"slam-asr: {failure(error.step, output)}", file=sys.stderr)
        return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(run.steps, time.monotonic() - started))
    return 0


def _run_options(arguments: list[str]) -> dict[str, Any]:
    """Options of `run RECIPE …`; those of the recipe have its values where the user wrote none."""
    named = bool(arguments) and not arguments[0].startswith("-")
    parser = _parser("run", "Run the five steps on this machine, one after another; steps that are done are kept.")
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


def _parser(command: str, description: str) -> ArgumentParser:
    usage = next(line for line in USAGE.splitlines() if f"pipelines {command} " in line)
    return ArgumentParser(
        prog=f"python -m pipelines {command}", usage=usage.removeprefix("usage:").strip(), description=description,
        exit_on_error=False, allow_abbrev=False,
    )


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
