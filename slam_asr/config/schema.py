"""YAML files with typed, documented keys: recipes and cluster profiles are such files.

A dataclass is the schema: its fields are the file's keys, and nested dataclasses are its sections. An
unknown key and a value of the wrong type are refused in a sentence that gives the key's full name.
"""

import difflib
import functools
import re
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from slam_asr.errors import ConfigurationError, UserError

T = TypeVar("T")


def new_parser(**options: Any) -> ArgumentParser:
    """Create a parser that shows the docstring below a field as the help of its option.

    Args:
        options: of jsonargparse's `ArgumentParser`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(**options)


def parse_yaml(text: str | bytes, where: str, example: str) -> dict[str, Any]:
    """Read the keys and values of a YAML text.

    Args:
        text: the YAML.
        where: the file's name in error messages: `Recipe demo`.
        example: a key that such a file may contain, for error messages.

    Raises:
        ConfigurationError: the text is not YAML, or contains something other than keys and values.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigurationError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{where} must contain keys and values, such as `{example}`; it contains {type(values).__name__}."
        )
    return values


def typed(values: dict[str, Any], kind: type[T], where: str) -> T:
    """Build a dataclass from nested dictionaries, with its defaults for the keys that they omit.

    Args:
        values: keys and values; sections are dictionaries.
        kind: the dataclass.
        where: the file's name in error messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a value that the dataclass itself refuses.
    """
    _refuse_unknown_keys(values, kind, "", where, keys_of(kind))
    parser = _parser_of(kind)  # type: ignore[arg-type]  # mypy takes a class for unhashable here
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError, by no clear rule
        raise ConfigurationError(f"{where}: {one_sentence(error)}") from error


@functools.cache
def _parser_of(kind: type) -> ArgumentParser:
    """Make the parser of a dataclass only once: reading all docstrings takes a quarter of a second."""
    parser = new_parser(exit_on_error=False)
    parser.add_class_arguments(kind, None)
    return parser


def keys_of(section: type, prefix: str = "") -> list[str]:
    """Full names of all sections and keys: `name`, `training`, `training.max_steps`, …"""
    keys = []
    for f in fields(section):
        keys.append(prefix + f.name)
        if is_dataclass(f.default_factory):
            keys += keys_of(f.default_factory, f"{prefix}{f.name}.")
    return keys


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the known word closest to a mistyped one, or an empty string.

    An abbreviation by initials counts as close (`lr` for `learning_rate`), and so does a correct name
    without its section (`max_steps` for `training.max_steps`).
    """
    # Initials first, because difflib finds too little similarity between `lr` and `learning_rate`.
    section, _, last = word.rpartition(".")
    for candidate in known:
        candidate_section, _, candidate_last = candidate.rpartition(".")
        initials = "".join(part[0] for part in re.split("[_-]", candidate_last) if part)
        if section in ("", candidate_section) and len(last) > 1 and last == initials:
            return f"; did you mean {candidate}?"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        # Reversed, so that of several keys with the same last part, the first one known remains.
        by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
        close = [by_last[c] for c in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def _refuse_unknown_keys(
    values: dict[str, Any], section: type, prefix: str, where: str, all_keys: list[str]
) -> None:
    known = {f.name: f for f in fields(section)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key {full}{nearest(full, all_keys) or '.'}")
        inner = known[key].default_factory
        if is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigurationError(f"{where}: {full} must contain keys of its own, not {value!r}.")
            _refuse_unknown_keys(value, inner, f"{full}.", where, all_keys)


def one_sentence(error: Exception) -> str:
    """A library's complaint about a value, in one line and in plain words.

    The text is rewritten, because jsonargparse's errors have no attributes for expected type and value.
    """
    text = " ".join(str(error).split())
    union = re.search(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .*", text
    )
    if union:
        value = text.rpartition("Given value: ")[2]
        types = union[1].replace("<class 'NoneType'>", "null").replace(", ", " or ")
        text = f"{text[: union.start()]}Expected a {types}. Got value: {value}"
    for library, plain in (
        ('Parser key "', ""),
        ('":', ":"),
        ("a typing.Literal", "one of "),
        ("typing.Literal", "one of "),
        ("<class 'int'>", "whole number"),
        ("<class 'float'>", "number"),
        ("<class 'str'>", "text"),
        ("<class 'bool'>", "true or false"),
        ("<class 'list'>", "list"),
    ):
        text = text.replace(library, plain)
    return text.rstrip(".") + "."
