"""Commands and their options: made from a function's signature, and accepted in every usual spelling.

jsonargparse makes the parser, the help and the typed values. This module adds lists as people write them
(`--manifests a.jsonl b.jsonl`), outdated and mixed spellings, and errors of one sentence.
"""

import inspect
import itertools
import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from jsonargparse import ArgumentParser

from slam_asr.config.schema import nearest, new_parser, one_sentence
from slam_asr.errors import ConfigurationError
from slam_asr.storage import is_s3

RENAMED_OPTIONS = {"--shard": "--work-shard"}
"""New names of renamed options, by old name. An old name still works, with a note on stderr."""


@dataclass(frozen=True)
class Command:
    """A command of a program."""

    function: str
    """`module:function` that the command runs."""
    positionals: str
    """Parameters that it takes by position, in capitals; `…` follows the name of a list: `FILES…`."""
    summary: str
    """What the command does, in half a line."""
    facts: str = ""
    """`module:function` that returns a sentence with which the command's help begins; empty for none."""


def list_commands(program: str, groups: Mapping[str, Mapping[str, str]], *notes: str) -> str:
    """Return the help of a program with several commands.

    Args:
        program: the program's name.
        groups: the commands and their summaries, keyed by the heading of their group.
        notes: the last lines.
    """
    lines = [f"usage: {program} COMMAND --option value …"]
    for heading, commands in groups.items():
        width = max(map(len, commands))
        lines += ["", f"{heading}:", *(f"  {call:<{width}}   {text}" for call, text in commands.items())]
    return "\n".join([*lines, "", *notes, ""])


def command_parser(program: str, description: str, positionals: str = "") -> ArgumentParser:
    """Return a parser for the options of a command.

    Args:
        program: the program and the command: `slam-asr train`.
        description: what the command does.
        positionals: as in `Command`, for the usage line.
    """
    return new_parser(
        prog=program,
        usage=f"%(prog)s {positionals}".rstrip(),
        description=description,
        # Errors are raised, so that `parse_options` can turn each of them into one sentence.
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_options(parser: ArgumentParser, described: Callable[..., Any]) -> None:
    """Add an option to a parser for each field of a dataclass, or parameter of a function except `recipe`.

    jsonargparse's own `add_function_arguments` would spell the options with underscores.
    """
    # Imported here because it is slow, and the list of all commands does without it.
    import docstring_parser

    documented = docstring_parser.parse_from_object(described).params
    help_texts = {p.arg_name: p.description or "" for p in documented}
    for name, parameter in inspect.signature(described).parameters.items():
        if name == "recipe" and not is_dataclass(described):
            continue
        required = parameter.default is inspect.Parameter.empty
        # jsonargparse would read `null` as no value. In scripts, it is often what a missing key gives.
        is_text = is_dataclass(described) and parameter.annotation == (str | None)
        parser.add_argument(
            option_name(name),
            type=str if is_text else parameter.annotation,
            help=" ".join(help_texts.get(name, "").split()),
            required=required,
            default=None if required else parameter.default,
        )


def option_name(parameter: str) -> str:
    """Return the option of a parameter, such as `--train-manifest` for `train_manifest`."""
    return "--" + parameter.replace("_", "-")


def parse_options(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse options into typed values by name.

    Names may mix dashes and underscores. A note on stderr reports each outdated spelling. A list may be given
    as `--x a b`, as `--x a --x b`, or as `--x '[a, b]'`.

    Raises:
        UserError: an option is unknown (the message suggests the nearest one), missing, or of the wrong type,
            or `--recipe` names another recipe than the one whose values are the defaults.
    """
    # argparse offers no public way to list a parser's options.
    known = parser._option_string_actions
    _show_lists(known)
    _complete_usage(parser)
    arguments, notes = _canonical_spelling(arguments, known)
    if notes:
        print(f"note: {'; '.join(notes)}", file=sys.stderr, flush=True)
    try:
        values = vars(parser.instantiate(parser.parse_args(_expand_lists(arguments, known))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigurationError(_complaint(parser, error)) from error
    named = known["--recipe"].default if "--recipe" in known else None
    if named and values["recipe"] != named:
        raise ConfigurationError(
            f"Two recipes are named, {named} and {values['recipe']}: leave out --recipe."
        )
    return values


def refuse_empty(options: Mapping[str, Any]) -> None:
    """Refuse empty options and `s3://` addresses without a bucket, which often come from unset variables.

    Args:
        options: values by name. Texts and lists of texts are checked, other values are not.

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
                is_s3(text)  # raises for an address without a bucket


def given_options(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return the names of the options on the command line, as the parser spells them, without `--`."""
    matches = (_OPTION.fullmatch(argument) for argument in arguments)
    known = parser._option_string_actions
    return [_known_name(match[1], known).removeprefix("--") for match in matches if match]


def take_words(arguments: list[str], own: str) -> tuple[list[str], list[str]]:
    """Separate words that are not the value of any option from the other arguments.

    In `--model M a.wav --files b.wav`, with `own` = `--files`, the only such word is `a.wav`.

    Args:
        arguments: options with one value each, and words between them.
        own: the only option that takes several values. Words after it are its values, so they are not
            separated.

    Returns:
        The separated words, and the other arguments.
    """
    words: list[str] = []
    rest: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument
        elif option != own and ("=" in option or option != rest[-1]):
            words.append(argument)
            continue
        rest.append(argument)
    return words, rest


def _complete_usage(parser: ArgumentParser) -> None:
    """Add the options to the usage line, with one placeholder for the recipe's keys, which fill a screen."""
    usage = parser.usage or "%(prog)s"
    positionals = {word.strip("[]…").lower() for word in usage.split()}
    # jsonargparse puts the keys into groups of their own. Without a recipe, there may be none yet.
    ungrouped = parser._optionals._group_actions
    options = [action for action in ungrouped if action.dest not in positionals]
    if "recipe" in positionals or len(ungrouped) < len(parser._actions):
        options.append(Action(["--SECTION.KEY"], dest="key", metavar="VALUE …"))
    formatter = parser.formatter_class(prog=usage % {"prog": parser.prog})
    formatter.add_usage(None, options, [], prefix="usage: ")
    parser.usage = formatter.format_help().removeprefix("usage: ").strip()


_OPTION = re.compile(r"(--[\w.-]+)(\+?(?:=.*)?)", re.DOTALL)


def _canonical_spelling(arguments: Sequence[str], known: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Spell every option as the parser does.

    Returns:
        The arguments with these spellings, and a note for each outdated spelling.
    """
    spelled, notes = [], {}
    for argument in arguments:
        if match := _OPTION.fullmatch(argument):
            name = _known_name(match[1], known)
            if name != match[1] and (match[1] in RENAMED_OPTIONS or name == option_name(match[1][2:])):
                notes[match[1]] = f"{match[1]} is now spelled {name}"
            argument = name + match[2]
        spelled.append(argument)
    return spelled, list(notes.values())


def _known_name(name: str, known: Mapping[str, Any]) -> str:
    """Return the parser's spelling of an option, or the name unchanged if the parser does not know it."""
    if name in known:
        return name
    # Change only the part that is a key of the recipe. The rest may be the user's:
    # `--published_wer.test-clean`.
    parts = name.removeprefix("--").split(".")
    # The longest key is tried first: `--training` is an option too, so it would match `--training.max_steps`.
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
    """Turn `--x a b` into `--x=[] --x+=a --x+=b`, in which jsonargparse accepts a list's values one by one.

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
        is_list, values = _is_list(option, known), [value] if equals else []
        while is_list and not equals and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        if not is_list or not values:
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
    if unknown := re.search(r"unrecognized arguments: --([^\s=]+)", text):
        known = [option.removeprefix("--") for option in options.values()]
        hint = nearest(unknown[1], known).replace("did you mean ", "did you mean --")
        return f"Unknown option --{unknown[1]}{hint or help_hint}"
    # This pattern also matches unknown options, so it comes second.
    if stray := re.search(r"unrecognized arguments: (\S+)", text):
        if stray[1].startswith("-"):
            return f"Unknown option {stray[1]}{help_hint}"
        return f"{stray[1]} follows no option: each value follows the name of its option{help_hint}"
    if valueless := re.search(r"argument (\S+?),?(?:/\S+)?: expected (?:one|at least one) argument", text):
        return f"{valueless[1]} lacks a value{help_hint}"
    if missing := re.search(r"arguments are required: (.*)", text):
        # Arguments by position are named as in the usage line.
        words = itertools.takewhile(lambda word: "-" not in word[:2], (parser.usage or "").split())
        shown = options | {w.strip("[]…").lower(): w.strip("[]") for w in words if w.strip("[]…").isupper()}
        names = [name.strip(" -") for name in missing[1].split(",")]
        return f"Missing: {', '.join(shown.get(name, f'--{name}') for name in names)}{help_hint}"
    sentence = one_sentence(error)
    if section := re.match(r"(\S+): Unable to load config '(.*?)' - ", sentence):
        return (
            f"Option --{section[1]} takes the path of a YAML file with the complete section, but "
            f"{section[2]} cannot be read as one: give another file, or set single keys, as in "
            f"--{section[1]}.KEY VALUE."
        )
    key = sentence.partition(":")[0]
    return f"Option {options[key]}{sentence.removeprefix(key)}" if key in options else f"Option --{sentence}"
