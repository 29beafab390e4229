"""`slam-asr STAGE …`: one sub-command a stage, made from the stage's own function.

The options are the function's parameters, with their help from its docstring; where it takes a
recipe, `--recipe` names one and every field of it can be overridden: `--training.max_steps 200`.
"""

import importlib
import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from slam_asr.configuration import nearest, one_sentence
from slam_asr.errors import UserError, exit_on_user_error
from slam_asr.recipe import Recipe, recipe_values, shipped_recipes
from slam_asr.stage import write_pointer
from slam_asr.version import describe_version

STAGES = {
    "build-manifest": "slam_asr.corpora.build:build_manifest",
    "extract-features": "slam_asr.features.extract:extract_features",
    "train": "slam_asr.training.train:train",
    "convert-checkpoint": "slam_asr.conversion.convert:convert_checkpoint",
    "decode": "slam_asr.decoding.decode:decode",
}
RESULTS_OF = (*STAGES, "score", "compare-runs")
"""Commands whose result is a folder with a record."""
COMMANDS = {
    **STAGES,
    "score": "slam_asr.scoring.score:score_parts",
    "compare": "slam_asr.scoring.compare:compare",
    "compare-runs": "slam_asr.sweeping.runs:compare_runs",
    "copy-models": "slam_asr.models.copy_to_bucket:copy_models",
    "plan": "slam_asr.planning.plan:plan",
    "transcribe": "slam_asr.transcribing.transcribe:transcribe",
    "features ls": "slam_asr.features.maintenance:list_store",
    "features verify": "slam_asr.features.maintenance:verify_store",
    "features prune": "slam_asr.features.maintenance:prune_store",
}

USAGE = """usage: slam-asr STAGE --option value …

stages, in order:
  build-manifest       a corpus becomes a manifest
  extract-features     the encoder's outputs, computed once
  train                the projector, with DeepSpeed
  convert-checkpoint   a checkpoint becomes a model folder
  decode               transcripts, word error rate, report

slam-asr transcribe MODEL FILES…  what is said in any audio, as text, JSON or subtitles
slam-asr score                 one report of a decoding that was done in parts
slam-asr compare A B           which of two decodings is better, and whether that may be chance
slam-asr compare-runs          many decodings on one page, with the curves of their trainings
slam-asr plan RECIPE           memory, time and storage that a recipe takes, before anything is loaded
slam-asr copy-models RECIPE    its frozen models into a bucket, once
slam-asr features ls STORE     what a feature store holds
slam-asr features verify STORE whether it is whole
slam-asr features prune STORE  what of it may go

slam-asr STAGE --help   its options
slam-asr --version      versions of slam-asr and torch, and the commit
"""


def main(arguments: list[str] | None = None) -> None:
    """Run one stage from the command line; a user's mistake ends with one sentence and code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif arguments[0] == "--version":
        print(describe_version())
    else:
        with exit_on_user_error():
            run(arguments[0], arguments[1:])


def run(stage: str, arguments: list[str]) -> Any:
    """Run a stage with options as they stand on the command line → its record."""
    stage, arguments = command_of(stage, arguments)
    if stage not in COMMANDS:
        raise UserError(
            f"There is no stage {stage}{nearest(stage, list(COMMANDS)) or '.'} Stages: {', '.join(COMMANDS)}."
        )
    module, name = COMMANDS[stage].split(":")
    arguments = spelt_out(arguments)
    function: Callable = getattr(importlib.import_module(module), name)
    parameter = inspect.signature(function).parameters.get("recipe")
    named = _recipe_named(arguments) if parameter else None
    # Where a recipe may be left out, it is, and its options with it.
    takes_recipe = parameter is not None and (
        parameter.default is inspect.Parameter.empty or named is not None
    )
    parser = ArgumentParser(
        prog=f"slam-asr {stage}",
        description=inspect.getdoc(function).split("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_function_arguments(function, skip={"recipe"}, fail_untyped=True)
    if takes_recipe:
        add_recipe_options(parser, named)
    elif parameter:
        parser.add_argument(
            "--recipe",
            help="a shipped recipe or a YAML file, where one is needed; each of its fields is an option then",
        )
    if stage in RESULTS_OF:
        parser.add_argument(
            "--pointer",
            type=str,
            help="a file that will name the result's folder, as the pipeline's steps hand it on: {uri, sha256, bytes}",
        )
    values = parse_options(parser, arguments)
    if takes_recipe:
        values["recipe"] = pop_recipe(values)
    pointer = values.pop("pointer", None)
    result = function(**values)
    if pointer:
        write_pointer(result, pointer)
    return result


def command_of(stage: str, arguments: list[str]) -> tuple[str, list[str]]:
    """`features`, `ls STORE …` → `features ls`, `--store STORE …`; `transcribe`, `MODEL FILE FILE …` → `--model`, `--files+` twice; `compare`, `A B`."""
    count = next((at for at, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    if stage == "transcribe":
        model, files = arguments[: min(count, 1)], arguments[1:count]
        return stage, [
            *(f"--model={name}" for name in model),
            *(f"--files+={file}" for file in files),
            *arguments[count:],
        ]
    if stage == "compare" and count <= 2:
        return stage, [
            *(
                f"--{side}={place}"
                for side, place in zip(("first", "second"), arguments[:count], strict=False)
            ),
            *arguments[count:],
        ]
    if stage != "features":
        return stage, arguments
    verbs = [command.partition(" ")[2] for command in COMMANDS if command.startswith("features ")]
    if not arguments or arguments[0] not in verbs:
        raise UserError(
            f"slam-asr features needs one of {', '.join(verbs)}, such as `slam-asr features ls STORE`."
        )
    verb, *rest = arguments
    return f"features {verb}", ["--store", *rest] if rest and not rest[0].startswith("-") else rest


def spelt_out(arguments: list[str]) -> list[str]:
    """`RECIPE --gpu-memory 80` → `--recipe RECIPE --gpu_memory 80`: what people are used to from other programs."""
    if arguments and (arguments[0] in shipped_recipes() or arguments[0].endswith((".yaml", ".yml"))):
        arguments = ["--recipe", *arguments]
    return [_underscored(argument) for argument in arguments]


def _underscored(argument: str) -> str:
    return re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), argument)


def add_recipe_options(parser: ArgumentParser, recipe: str | None) -> None:
    """Give a parser `--recipe` and an option for each field of the recipe named, with its values as defaults.

    Raises:
        UserError: there is no such recipe, or it is wrong.
    """
    shipped = ", ".join(shipped_recipes())
    parser.add_argument("--recipe", default=recipe, help=f"a shipped recipe ({shipped}) or a YAML file")
    parser.add_class_arguments(Recipe, None)
    if recipe is not None:
        parser.set_defaults(recipe_values(recipe))


def pop_recipe(values: dict[str, Any]) -> Recipe:
    """Take the recipe's fields out of parsed options.

    Raises:
        UserError: no recipe was named, or values contradict.
    """
    if values.pop("recipe") is None:
        raise UserError(
            f"--recipe is missing: name a shipped recipe ({', '.join(shipped_recipes())}) or a YAML file."
        )
    return Recipe(**{f.name: values.pop(f.name) for f in fields(Recipe)})


def parse_options(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """Options as a dictionary of typed values; names may have dashes for underscores.

    Raises:
        UserError: an option that is unknown (with the nearest valid one), missing, or of the wrong type.
    """
    try:
        return vars(parser.instantiate(parser.parse_args([_underscored(argument) for argument in arguments])))
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_complaint(parser, error)) from error


def _complaint(parser: ArgumentParser, error: Exception) -> str:
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)", str(error))
    help_hint = f"; see `{parser.prog} --help`."
    if unknown:
        known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
        hint = nearest(unknown[1], known).replace("did you mean ", "did you mean --")
        return f"Unknown option --{unknown[1]}{hint or help_hint}"
    stray = re.search(r"unrecognized arguments: (\S+)", str(error))
    if stray:
        return f"{stray[1]} stands alone: each value follows the name of its option{help_hint}"
    valueless = re.search(r"argument (\S+): expected (?:one|at least one) argument", str(error))
    if valueless:
        return f"{valueless[1]} lacks a value{help_hint}"
    missing = re.search(r"arguments are required: (.*)", str(error))
    if missing:
        return f"Missing: {', '.join('--' + name.strip(' -') for name in missing[1].split(','))}{help_hint}"
    return f"Option --{one_sentence(error)}"


def _recipe_named(arguments: list[str]) -> str | None:
    """The value of `--recipe`, needed before the options that it gives defaults to.

    Without one, a model's own recipe serves: `decode --model FOLDER`.
    """
    named = _value_of("--recipe", arguments)
    model = _value_of("--model", arguments)
    if named is None and model is not None:
        from slam_asr.conversion.model import read_config

        return read_config(model).recipe
    return named


def _value_of(option: str, arguments: list[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
