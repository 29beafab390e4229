"""`slam-asr COMMAND …`: one command per stage and a few others, each built from its own function.

The options are the function's parameters, spelled with dashes; their help is the function's docstring.
If a stage takes a recipe, `--recipe` names it, and each key of the recipe is an option too, spelled as in the
YAML file: `--training.max_steps 200`.
"""

import importlib
import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from slam_asr.artifacts.stage_record import write_pointer
from slam_asr.config.recipe import Recipe, recipe_values, shipped_recipes
from slam_asr.config.schema import nearest, new_parser, one_sentence
from slam_asr.errors import ConfigurationError, UserError, exit_on_user_error
from slam_asr.runtime.utf8 import ensure_utf8
from slam_asr.steps import STEPS
from slam_asr.storage import is_s3
from slam_asr.version import describe_version


@dataclass(frozen=True)
class Command:
    """A command that is not a step of a pipeline."""

    name: str
    arguments: str
    """The arguments after the name in the simplest call, for the usage text."""
    summary: str
    """What the command does, in half a line."""
    function: str
    """`module:function` that the command runs."""


STEP_FUNCTIONS = {name: step.function for name, step in STEPS.items() if step.function}
"""Steps that are commands. Each writes a folder with a record, to which `--pointer` can write a pointer."""
OTHER_COMMANDS = (
    Command(
        "transcribe",
        "MODEL FILES…",
        "transcribe audio files to text, JSON or subtitles",
        "slam_asr.stages.transcribe:transcribe",
    ),
    Command(
        "compare",
        "A B",
        "which of two decodings is better, and whether by more than chance",
        "slam_asr.stages.compare:compare",
    ),
    Command(
        "plan",
        "RECIPE",
        "estimate memory, time and storage before anything is loaded",
        "slam_asr.stages.plan:plan",
    ),
    Command(
        "copy-models",
        "RECIPE",
        "copy the recipe's frozen models to a bucket",
        "slam_asr.pretrained.copy_to_bucket:copy_models",
    ),
    Command(
        "features ls",
        "STORE",
        "list what a feature store contains",
        "slam_asr.features.maintenance:list_store",
    ),
    Command(
        "features verify",
        "STORE",
        "check that a feature store is complete and undamaged",
        "slam_asr.features.maintenance:verify_store",
    ),
    Command(
        "features prune",
        "STORE",
        "delete what is no longer needed from a feature store",
        "slam_asr.features.maintenance:prune_store",
    ),
)
COMMANDS = STEP_FUNCTIONS | {command.name: command.function for command in OTHER_COMMANDS}
"""`module:function` of each command. The module is imported only when the command runs."""

RENAMED_OPTIONS = {"--shard": "--work-shard"}
"""New names of renamed options, by old name. An old name still works, with a note on stderr."""


def usage() -> str:
    """Return the text that `slam-asr --help` prints: all commands, each with a summary."""
    stages = [f"  {name:<20} {STEPS[name].summary}" for name in STEP_FUNCTIONS]
    others = [f"  {f'{c.name} {c.arguments}':<25} {c.summary}" for c in OTHER_COMMANDS]
    return "\n".join(
        [
            "usage: slam-asr COMMAND --option value …",
            "",
            "stages, in order:",
            *stages,
            "",
            "other commands:",
            *others,
            "",
            "slam-asr COMMAND --help   the options of a command",
            "slam-asr --version        versions of slam-asr and torch, and the commit",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command from the command line. A user's mistake ends it with one sentence and exit code 2."""
    if arguments is None:
        ensure_utf8()
        arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
    elif arguments[0] == "--version":
        print(describe_version())
    else:
        with exit_on_user_error():
            run(arguments[0], arguments[1:])


def run(stage: str, arguments: list[str]) -> Any:
    """Run a command with its command-line options.

    Returns:
        What the command's function returns; for a stage, its record.

    Raises:
        UserError: no such command, a wrong option, or a mistake that the stage itself reports.
    """
    stage, arguments = resolve_command(stage, arguments)
    if stage not in COMMANDS:
        raise ConfigurationError(
            f"There is no stage {stage}{nearest(stage, list(COMMANDS)) or '.'} Stages: {', '.join(COMMANDS)}."
        )
    module, name = COMMANDS[stage].split(":")
    arguments = with_recipe_option(arguments)
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    recipe_parameter = inspect.signature(function).parameters.get("recipe")
    recipe = _recipe_named(arguments) if recipe_parameter else None
    # If the recipe is optional and none is named, its keys are not options either.
    takes_recipe = recipe_parameter is not None and (
        recipe_parameter.default is inspect.Parameter.empty or recipe is not None
    )
    parser = new_parser(
        prog=f"slam-asr {stage}",
        description=(inspect.getdoc(function) or "").split("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    add_stage_options(parser, function)
    if takes_recipe:
        add_recipe_options(parser, recipe)
    elif recipe_parameter:
        parser.add_argument(
            "--recipe",
            help="a shipped recipe or a YAML file, where one is needed; each of its keys is then an option",
        )
    if stage in STEP_FUNCTIONS:
        parser.add_argument(
            "--pointer",
            type=str,
            help="also write a small JSON file {uri, sha256, bytes} that points to the result's folder, "
            "as the pipeline's steps do",
        )
    values = parse_options(parser, arguments)
    if takes_recipe:
        values["recipe"] = pop_recipe(values)
    pointer = values.pop("pointer", None)
    parameters = inspect.signature(function).parameters
    check_places({name: values[name] for name, p in parameters.items() if name in values and p.default != ""})
    result = function(**values)
    if pointer:
        write_pointer(result, pointer)
    return result


def check_places(options: Mapping[str, Any]) -> None:
    """Refuse options that are empty, or an address without a bucket, as if a shell's variable is not set.

    Args:
        options: values by name, of which texts and lists of texts are checked.

    Raises:
        ConfigurationError: an option is empty. As a path it would be the working folder.
        StorageError: an address names no bucket.
    """
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if text == "":
                raise ConfigurationError(
                    f"{option_name(name)} is empty: give a value, or leave the option out."
                )
            if isinstance(text, str):
                is_s3(text)


def resolve_command(stage: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Turn the arguments that some commands take by position into options.

    `features`, `ls STORE …` becomes `features ls`, `--store STORE …`; `transcribe`, `MODEL FILE FILE …`
    becomes `--model=MODEL --files+=FILE --files+=FILE …`; `compare`, `A B` becomes `--first=A --second=B`.

    Raises:
        ConfigurationError: `features` without one of its sub-commands.
    """
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
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
                f"--{side}={folder}"
                for side, folder in zip(("first", "second"), arguments[:count], strict=False)
            ),
            *arguments[count:],
        ]
    if stage != "features":
        return stage, arguments
    verbs = [command.partition(" ")[2] for command in COMMANDS if command.startswith("features ")]
    if not arguments or arguments[0] not in verbs:
        raise ConfigurationError(
            f"slam-asr features needs one of {', '.join(verbs)}, such as `slam-asr features ls STORE`."
        )
    verb, *rest = arguments
    return f"features {verb}", ["--store", *rest] if rest and not rest[0].startswith("-") else rest


def with_recipe_option(arguments: list[str]) -> list[str]:
    """`RECIPE --hours 80` → `--recipe RECIPE --hours 80`, if the first argument is a recipe."""
    if arguments and (arguments[0] in shipped_recipes() or arguments[0].endswith((".yaml", ".yml"))):
        return ["--recipe", *arguments]
    return arguments


def add_stage_options(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    """Add an option to a parser for each parameter of a stage's function, except its recipe.

    jsonargparse's own `add_function_arguments` would spell the options with underscores.
    """
    docstring = docstring_parser.parse(inspect.getdoc(function) or "")
    help_texts = {entry.arg_name: entry.description or "" for entry in docstring.params}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "recipe":
            continue
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(
            option_name(name),
            type=parameter.annotation,
            help=" ".join(help_texts.get(name, "").split()),
            required=required,
            default=None if required else parameter.default,
        )


def option_name(parameter: str) -> str:
    """`train_manifest` → `--train-manifest`."""
    return "--" + parameter.replace("_", "-")


def add_recipe_options(parser: ArgumentParser, recipe: str | None) -> None:
    """Add `--recipe` to a parser, and an option for each key. The named recipe's values are the defaults.

    Raises:
        UserError: there is no such recipe, or it is not valid.
    """
    shipped = ", ".join(shipped_recipes())
    parser.add_argument("--recipe", default=recipe, help=f"a shipped recipe ({shipped}) or a YAML file")
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


def parse_options(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse options into typed values by name.

    Names may mix dashes and underscores. An outdated spelling is noted on stderr, once per command.
    A list may be given as `--x a b`, as `--x a --x b`, or as `--x '[a, b]'`.

    Raises:
        UserError: an option is unknown (the message suggests the nearest one), missing, or of the wrong type.
    """
    # argparse offers no public way to list a parser's options.
    known = parser._option_string_actions
    _show_lists(known)
    arguments, notes = _canonical_spelling(arguments, known)
    if notes:
        print(f"note: {'; '.join(notes)}", file=sys.stderr, flush=True)
    try:
        return vars(parser.instantiate(parser.parse_args(_expand_lists(arguments, known))))
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigurationError(_complaint(parser, error)) from error


_OPTION = re.compile(r"(--[\w.-]+)(\+?(?:=.*)?)", re.DOTALL)


def _canonical_spelling(arguments: Sequence[str], known: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Spell every option as the parser does.

    Returns:
        The arguments with these spellings, and a note for each outdated spelling.
    """
    spelled, notes = [], {}
    for argument in arguments:
        match = _OPTION.fullmatch(argument)
        if match:
            name = _known_name(match[1], known)
            if name != match[1] and (match[1] in RENAMED_OPTIONS or name == option_name(match[1][2:])):
                notes[match[1]] = f"{match[1]} is now spelled {name}"
            argument = name + match[2]
        spelled.append(argument)
    return spelled, list(notes.values())


def _known_name(name: str, known: Mapping[str, Any]) -> str:
    """The parser's spelling of an option, or the name unchanged if the parser does not know it."""
    if name in known:
        return name
    # Change only the part that is a key of the recipe. The rest may be the user's:
    # `--published_wer.test-clean`.
    parts = name.removeprefix("--").split(".")
    # The longest key first: `--training` is an option too, so it would match `--training.max_steps`.
    for count in range(len(parts), 0, -1):
        key = "--" + ".".join(parts[:count]).replace("-", "_")
        if key in known:
            return ".".join([key, *parts[count:]])
    for candidate in (option_name(name.removeprefix("--")), RENAMED_OPTIONS.get(name)):
        if candidate is not None and candidate in known:
            return candidate
    return name


def _is_list(option: str, known: Mapping[str, Any]) -> bool:
    # jsonargparse gives every option that holds a list a second name, which appends: `--files+`.
    return f"{option}+" in known


def _show_lists(known: Mapping[str, Any]) -> None:
    """Make `--help` show lists as `--manifests MANIFESTS …` rather than `--manifests [ITEM,...]`."""
    for option, action in known.items():
        if _is_list(option, known):
            action.metavar = f"{action.dest.rpartition('.')[2].upper()} …"
            action.option_strings = [option]


def _expand_lists(arguments: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """`--x a b` → `--x=[] --x+=a --x+=b`, the form in which jsonargparse accepts a list's values one by one.

    The empty list replaces the option's default, so it precedes only the first occurrence. jsonargparse
    also reads YAML, so `--x+=[a, b]` appends two values. A shell splits an unquoted `[a, b]` at the space,
    so the pieces are joined again first.
    """
    expanded: list[str] = []
    begun: set[str] = set()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if not _is_list(option, known):
            expanded.append(argument)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        if not values:
            expanded.append(argument)
            continue
        if values[0].startswith("[") and values[-1].endswith("]"):
            values = [" ".join(values)]
        if option not in begun:
            expanded.append(f"{option}=[]")
            begun.add(option)
        expanded += [f"{option}+={value}" for value in values]
    return expanded


def _complaint(parser: ArgumentParser, error: Exception) -> str:
    """Turn a library's complaint about the options into one sentence that names the option and the remedy.

    The text is searched, because jsonargparse wraps argparse's errors in new ones, whose `argument_name` is
    empty.
    """
    text = str(error)
    options = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    help_hint = f"; see `{parser.prog} --help`."
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)", text)
    if unknown:
        known = [option.removeprefix("--") for option in options.values()]
        hint = nearest(unknown[1], known).replace("did you mean ", "did you mean --")
        return f"Unknown option --{unknown[1]}{hint or help_hint}"
    # This pattern also matches unknown options, so it comes second.
    stray = re.search(r"unrecognized arguments: (\S+)", text)
    if stray and stray[1].startswith("-"):
        return f"Unknown option {stray[1]}{help_hint}"
    if stray:
        return f"{stray[1]} follows no option: each value follows the name of its option{help_hint}"
    valueless = re.search(r"argument (\S+?),?(?:/\S+)?: expected (?:one|at least one) argument", text)
    if valueless:
        return f"{valueless[1]} lacks a value{help_hint}"
    missing = re.search(r"arguments are required: (.*)", text)
    if missing:
        names = [name.strip(" -") for name in missing[1].split(",")]
        return f"Missing: {', '.join(options.get(name, f'--{name}') for name in names)}{help_hint}"
    sentence = one_sentence(error)
    key = sentence.partition(":")[0]
    return f"Option {options[key]}{sentence.removeprefix(key)}" if key in options else f"Option --{sentence}"


def _recipe_named(arguments: list[str]) -> str | None:
    """The value of `--recipe`, which is read before the other options because it provides their defaults.

    Without `--recipe`, it is the recipe saved in the model folder that `--model` names.
    """
    recipe = _value_of("--recipe", arguments)
    model = _value_of("--model", arguments)
    if recipe is None and model is not None:
        from slam_asr.artifacts.model_folder import read_config

        return read_config(model).recipe
    return recipe


def _value_of(option: str, arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
