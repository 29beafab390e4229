"""The command line of `python -m pipelines`."""

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from components import DEFAULT_IMAGES, IMAGES_VARIABLE
from pipelines import processes
from slam_asr.errors import EXIT_CODE, UserError, exit_on_user_error
from slam_asr.recipe import Recipe, dump_recipe, load_recipe, nearest, one_sentence, recipe_keys, shipped_recipes
from slam_asr.storage import local_path

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_CORPUS = CHECKOUT / "demo" / "speech"
COMMANDS = ("run", "compile")
RUN_OPTIONS = ("corpus", "output")
COMPILE_OPTIONS = ("output", "images")


def main(argv: Sequence[str] | None = None) -> int:
    """Compile or run; the exit code is 0, 1 (a defect), 2 (the user's to mend) or 130 (interrupted)."""
    with processes.interruptible(), exit_on_user_error():
        options = _parse(list(sys.argv[1:] if argv is None else argv))
        if options.subcommand == "compile":
            return _compile(options.compile)
        return _run(options.run)


def _parse(argv: list[str]) -> Namespace:
    try:
        # Without defaults, what is left is what the user wrote: it goes on top of the recipe.
        return _parser().parse_args(argv or ["--help"], defaults=False)
    except ArgumentError as error:
        raise UserError(_explained(error, argv)) from error


def _parser() -> ArgumentParser:
    parser = _plain_parser(prog="python -m pipelines", description="The SLAM-ASR pipeline, on a cluster or on this machine.")
    commands = parser.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("run", _run_parser(), help="run the five steps on this machine")
    commands.add_subcommand("compile", _compile_parser(), help="write the YAML to submit to Kubeflow Pipelines")
    return parser


def _run_parser() -> ArgumentParser:
    parser = _plain_parser(
        usage="python -m pipelines run RECIPE [--corpus PATH] [--output DIR] [--SECTION.KEY VALUE ...]",
        description="Run the five steps on this machine, one after another. Run again, it keeps the steps that are done.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"a recipe's file, or one of {', '.join(shipped_recipes())}")
    parser.add_argument("--corpus", type=str, help="folder or file of the corpus (demo brings its own)")
    parser.add_argument("--output", type=str, help="folder for all results (default: runs/RECIPE)")
    # A default shown by --help is the key's own: the recipe may say otherwise.
    parser.add_class_arguments(Recipe, None, help="keys of the recipe; any can be set here, such as --training.max_steps 50")
    return parser


def _compile_parser() -> ArgumentParser:
    parser = _plain_parser(
        usage="python -m pipelines compile [--output DIR|FILE.yaml] [--images TEMPLATE]",
        description="Write the pipeline and each component as YAML; the same source gives the same bytes.",
    )
    parser.add_argument("--output", type=str, help="folder, or a .yaml file for the pipeline alone (default: build/kfp)")
    parser.add_argument(
        "--images", type=str,
        help=f"the steps' images, with {{stage}} and {{version}} (default: ${IMAGES_VARIABLE}, else {DEFAULT_IMAGES})",
    )
    return parser


def _plain_parser(**settings: Any) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **settings)


def _explained(error: ArgumentError, argv: list[str]) -> str:
    """The parser's complaint as a sentence; for an unknown option, with the nearest one there is."""
    if argv[0] not in COMMANDS:
        return f"Unknown command {argv[0]}{nearest(argv[0], list(COMMANDS)) or '.'} Commands: {', '.join(COMMANDS)}."
    unknown = re.match(r"unrecognized arguments: (\S+)", str(error), re.IGNORECASE)
    if not unknown:
        return f"{one_sentence(error)} See `python -m pipelines {argv[0]} --help`."
    word = unknown[1].partition("=")[0].lstrip("-")
    known = COMPILE_OPTIONS if argv[0] == "compile" else (*RUN_OPTIONS, *recipe_keys())
    if not unknown[1].startswith("-"):
        return f"Unexpected argument {unknown[1]}: options are written as --name value."
    hint = nearest(word, list(known)).replace("did you mean ", "did you mean --")
    return f"Unknown option --{word}{hint or '.'}"


def _compile(options: Namespace) -> int:
    if options.get("images"):
        os.environ[IMAGES_VARIABLE] = options.images
    # kfp reads the images' names when the components are defined, that is, imported.
    from pipelines.compile import compile_all

    for path in compile_all(local_path(options.get("output") or "build/kfp")):
        print(path)
    return 0


def _run(options: Namespace) -> int:
    overrides = {key: value for key, value in options.items() if key not in ("recipe", *RUN_OPTIONS)}
    recipe = load_recipe(options.recipe, overrides)
    corpus = _corpus(options)
    output = local_path(options.get("output") or Path("runs") / Path(options.recipe).stem).absolute()

    started = time.monotonic()
    if code := _fetch_models(recipe):
        return code

    from pipelines.local import LocalRun, StepFailed
    from pipelines.summary import failure, summary

    run = LocalRun(output)
    try:
        run.execute(dump_recipe(recipe), str(corpus))
    except StepFailed as error:
        print(f"slam-asr: {failure(error.step, output)}", file=sys.stderr)
        return EXIT_CODE if error.step.exit_code == EXIT_CODE else 1
    print("\n" + summary(run.steps, time.monotonic() - started))
    return 0


def _fetch_models(recipe: Recipe) -> int:
    """Have both frozen models on this machine first: a misspelt name fails now and not hours later."""
    command = [sys.executable, "-m", "slam_asr.models.pretrained", recipe.encoder.name, recipe.llm.name]
    return processes.run(command, lambda line: print(line, end="", flush=True))


def _corpus(options: Namespace) -> Path:
    """The corpus as an absolute path, after a look that it is there."""
    if options.get("corpus"):
        corpus = local_path(options.corpus).absolute()
    elif options.recipe == "demo":
        corpus = DEMO_CORPUS
    else:
        raise UserError(f"Recipe {options.recipe} brings no corpus: say where yours is with --corpus PATH.")
    if not corpus.exists():
        raise UserError(f"There is no corpus at {corpus}: check --corpus.")
    return corpus
