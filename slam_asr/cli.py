"""`slam-asr COMMAND …`: one command per stage and a few others, each built from its own function.

The options are the function's parameters, spelled with dashes; their help is the function's docstring.
`--recipe` names a stage's recipe, and each key of a recipe is an option too: `--training.max_steps 200`.
"""

import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from jsonargparse import ArgumentParser

from slam_asr.artifacts.stage_record import write_pointer
from slam_asr.config.recipe import (
    MODEL_KEYS,
    Recipe,
    dump_recipe,
    recipe_values,
    shipped_recipes,
    with_base_models_of,
)
from slam_asr.config.schema import is_within, nearest
from slam_asr.errors import ConfigurationError, exit_on_user_error
from slam_asr.options import (
    Command,
    add_options,
    command_parser,
    given_options,
    list_commands,
    option_name,
    parse_options,
    refuse_empty,
    take_words,
)
from slam_asr.runtime.environment import prepare_environment
from slam_asr.steps import STEPS
from slam_asr.version import describe_version

STEP_FUNCTIONS = {name: step.function for name, step in STEPS.items() if step.function}
"""Steps that are commands. Each writes a folder with a record; `--pointer` also writes a pointer to it."""
_FACTS = "slam_asr.artifacts.shipped:describe_default"
_MAINTENANCE = "slam_asr.features.maintenance"
OTHER_COMMANDS = {
    "transcribe": Command(
        "slam_asr.stages.transcribe:transcribe", "FILES…", "transcribe audio to text or subtitles", _FACTS
    ),
    "serve": Command(
        "slam_asr.stages.serve:serve", "[MODEL]", "transcribe over HTTP, with OpenAI's interface", _FACTS
    ),
    "compare": Command(
        "slam_asr.stages.compare:compare",
        "FIRST SECOND",
        "which of two decodings is better, and whether by more than chance",
    ),
    "plan": Command(
        "slam_asr.stages.plan:plan", "RECIPE", "estimate memory, time and storage before anything is loaded"
    ),
    "copy-models": Command(
        "slam_asr.pretrained.copy_to_bucket:copy_models", "[RECIPE]", "copy a recipe's models to a bucket"
    ),
    "features ls": Command(f"{_MAINTENANCE}:list_store", "STORE", "list what a feature store contains"),
    "features verify": Command(
        f"{_MAINTENANCE}:verify_store", "STORE", "check that a feature store is complete and undamaged"
    ),
    "features prune": Command(
        f"{_MAINTENANCE}:prune_store", "STORE", "delete what is no longer needed from a feature store"
    ),
}
COMMANDS = STEP_FUNCTIONS | {name: command.function for name, command in OTHER_COMMANDS.items()}
"""`module:function` of each command. The module is imported only when the command runs."""

EFFECTIVE_KEYS = {
    "decode": ("decoding", "features.cache", *MODEL_KEYS),
    "transcribe": ("decoding", *MODEL_KEYS),
    "serve": ("decoding", *MODEL_KEYS),
    "convert-checkpoint": MODEL_KEYS,
    "score": ("decoding", "published_wer"),
    "publish": ("publish", "gate"),
}
"""By command, the keys of a recipe that have an effect on a model that is already trained. The model's own
recipe decides all others."""


def usage() -> str:
    """Return the text that `slam-asr --help` prints: all commands, each with a summary."""
    return list_commands(
        "slam-asr",
        {
            "stages, in order": {name: STEPS[name].summary for name in STEP_FUNCTIONS},
            "other commands": {f"{name} {c.positionals}": c.summary for name, c in OTHER_COMMANDS.items()},
        },
        "slam-asr COMMAND --help   the options of a command",
        "slam-asr --version        versions of slam-asr and torch, and the commit",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command from the command line. A user's mistake ends it with one sentence and exit code 2."""
    if arguments is None:
        prepare_environment()
        arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
    elif arguments[0] == "--version":
        print(describe_version())
    else:
        with exit_on_user_error():
            run(arguments[0], arguments[1:])


def run(command: str, arguments: list[str]) -> Any:
    """Run a command with its command-line options.

    Returns:
        What the command's function returns; for a stage, its record.

    Raises:
        UserError: the command does not exist, an option is wrong, or the command itself reports a mistake.
    """
    command, arguments = resolve_command(command, arguments)
    if command not in COMMANDS:
        raise ConfigurationError(
            f"There is no command {command}{nearest(command, list(COMMANDS)) or '.'} "
            f"Commands: {', '.join(COMMANDS)}."
        )
    function: Callable[..., Any] = pkgutil.resolve_name(COMMANDS[command])
    parameters = inspect.signature(function).parameters
    recipe_parameter = parameters.get("recipe")
    trained = _recipe_of_model(command, arguments) if recipe_parameter else None
    recipe = _value_of("--recipe", arguments) or (dump_recipe(trained) if trained else None)
    # If the recipe is optional and none is named, its keys are not options either.
    takes_recipe = recipe_parameter is not None and (
        recipe_parameter.default is inspect.Parameter.empty or recipe is not None
    )
    parser = command_parser(f"slam-asr {command}", _description(command, function), positionals_of(command))
    add_options(parser, function)
    if takes_recipe:
        add_recipe_options(parser, recipe)
    elif recipe_parameter:
        help_text = "a shipped recipe or a YAML file, where one is needed; each of its keys is then an option"
        parser.add_argument("--recipe", help=help_text)
    if command in STEP_FUNCTIONS:
        parser.add_argument(
            "--pointer",
            type=str,
            help="also write a pointer, a small JSON file that names the result's folder (uri, sha256, "
            "bytes, stage, summary, fingerprint), as the pipeline's steps do",
        )
    values = parse_options(parser, arguments)
    if takes_recipe:
        values["recipe"] = pop_recipe(values)
    if trained:
        sections = {f.name for f in fields(Recipe)}
        given = [name for name in given_options(parser, arguments) if is_within(name, sections)]
        _refuse_ineffective(command, given)
        values["recipe"] = _with_known_models(values["recipe"], trained, given)
    pointer = values.pop("pointer", None)
    # A text whose default is empty may be empty.
    refuse_empty({name: values[name] for name, p in parameters.items() if name in values and p.default != ""})
    result = function(**values)
    if pointer:
        write_pointer(result, pointer)
    return result


def _description(command: str, function: Callable[..., Any]) -> str:
    """Return the first lines of a command's help."""
    summary = (inspect.getdoc(function) or "").split("\n")[0]
    facts = OTHER_COMMANDS[command].facts if command in OTHER_COMMANDS else ""
    return f"{pkgutil.resolve_name(facts)()} {summary}" if facts else summary


def positionals_of(command: str) -> str:
    """Return the parameters that a command takes by position, as its usage shows them."""
    return (OTHER_COMMANDS | STEPS)[command].positionals if command in COMMANDS else ""


def resolve_command(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Turn arguments that a command takes by position into options.

    (`features`, `ls STORE`) becomes (`features ls`, `--store=STORE`), and (`transcribe`, `A B`) becomes
    (`transcribe`, `--model=MODEL --files+=A --files+=B`), where MODEL is the default model. A recipe may come
    first if a command takes no other argument by position.

    Raises:
        ConfigurationError: `features` without one of its sub-commands.
    """
    if command == "features":
        verbs = [known.partition(" ")[2] for known in COMMANDS if known.startswith("features ")]
        if not arguments or arguments[0] not in verbs:
            one_of = ", ".join(verbs)
            raise ConfigurationError(f"slam-asr features needs one of {one_of}, such as `features ls STORE`.")
        command, arguments = f"features {arguments[0]}", arguments[1:]
    positionals = positionals_of(command).split()
    if not positionals and arguments and _is_recipe(arguments[0]):
        positionals = ["RECIPE"]
    values = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    options, rest = [], arguments[len(values) :]
    if not values and positionals == ["FILES…"]:
        values, rest = take_words(rest, "--files")
    by_default = command == "transcribe" or (command == "serve" and not values)
    if by_default and _value_of("--model", arguments) is None:
        options.append(f"--model={_take_model(values)}")
    for positional in positionals:
        name = option_name(positional.strip("[…]").lower())
        if positional.endswith("…"):
            options += [f"{name}+={value}" for value in values]
            values = []
        elif values:
            options.append(f"{name}={values.pop(0)}")
    # Values that are left over stay without an option's name, and the parser refuses them.
    return command, [*options, *values, *rest]


def _take_model(words: list[str]) -> str:
    """Return the default model; or remove and return the first word if it is a model, as in old versions."""
    from slam_asr.artifacts.shipped import default_model, is_model

    if not words or not is_model(words[0]):
        return default_model()
    print("note: a model before the files is now spelled --model MODEL", file=sys.stderr, flush=True)
    return words.pop(0)


def _is_recipe(argument: str) -> bool:
    return argument in shipped_recipes() or argument.endswith((".yaml", ".yml"))


def add_recipe_options(parser: ArgumentParser, recipe: str | None) -> None:
    """Add `--recipe` to a parser, and an option for each key. The named recipe's values are the defaults.

    Raises:
        UserError: the recipe does not exist, or is not valid.
    """
    shipped = ", ".join(shipped_recipes())
    # The help shows the default. For a model's own recipe, that would be the complete YAML text.
    default = "the model's own" if recipe and "\n" in recipe else recipe
    parser.add_argument("--recipe", default=default, help=f"a shipped recipe ({shipped}) or a YAML file")
    parser.add_class_arguments(Recipe, None)
    if recipe is not None:
        parser.set_defaults(recipe_values(recipe))


def pop_recipe(values: dict[str, Any]) -> Recipe:
    """Remove the recipe's keys from parsed options and build the recipe from them.

    Raises:
        UserError: no recipe was named, or its values contradict each other.
    """
    if values.pop("recipe") is None:
        raise ConfigurationError(
            f"--recipe is missing: name a shipped recipe ({', '.join(shipped_recipes())}) or a YAML file."
        )
    return Recipe(**{f.name: values.pop(f.name) for f in fields(Recipe)})


def _recipe_of_model(command: str, arguments: list[str]) -> Recipe | None:
    """Read the recipe in the model or checkpoint that the command line names, if the command uses it.

    It is read before the other options because it provides their defaults. A recipe that comes with a model
    is not the user's decision, so it never allows an LLM's own code.

    Returns:
        The recipe; None if the command line names no model with a recipe, or if the command does not use it.
    """
    model = _value_of("--model", arguments) if command in EFFECTIVE_KEYS else None
    # If the user names a recipe, score and publish take their settings from it.
    if command in ("score", "publish") and _value_of("--recipe", arguments):
        return None
    if model is not None:
        from slam_asr.artifacts.model_folder import read_config

        return with_base_models_of(read_config(model).typed_recipe, None)
    checkpoint = _value_of("--checkpoint", arguments)
    if command == "convert-checkpoint" and checkpoint is not None and _has_recipe_option(arguments):
        from slam_asr.conversion.sources import recipe_in

        trained = recipe_in(checkpoint)
        return trained and with_base_models_of(trained, None)
    return None


def _has_recipe_option(arguments: list[str]) -> bool:
    names = {f.name for f in fields(Recipe)} | {"recipe"}
    given = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
    return any(is_within(name, names) for name in given)


def _refuse_ineffective(command: str, given: Sequence[str]) -> None:
    """Refuse an option for a key of the recipe that has no effect on a model that is already trained.

    Raises:
        ConfigurationError: the command line has such an option.
    """
    effective = EFFECTIVE_KEYS[command]
    if ineffective := [key for key in given if not is_within(key, effective)]:
        raise ConfigurationError(
            f"--{ineffective[0]} has no effect on a model that is already trained, because the recipe of its "
            f"training decides it: leave it out. Keys with an effect on {command}: {', '.join(effective)}."
        )


def _with_known_models(recipe: Recipe, trained: Recipe, given: Sequence[str]) -> Recipe:
    """Return the recipe with the base models of the training, except those that the command line names."""
    if "encoder.name" not in given:
        recipe = replace(recipe, encoder=replace(recipe.encoder, name=trained.encoder.name))
    if "llm.name" not in given:
        recipe = replace(recipe, llm=replace(recipe.llm, name=trained.llm.name))
    return recipe


def _value_of(option: str, arguments: list[str]) -> str | None:
    # jsonargparse cannot parse these options yet: their values decide which options the parser knows.
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
