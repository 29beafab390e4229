"""YAML files with typed, documented keys: recipes and cluster profiles are such files.

A dataclass is the schema: its fields are the file's keys, and nested dataclasses are its sections. A number's
bounds are next to its default, and a section's method `contradictions` names values that cannot be combined.
Wrong values are refused in a sentence that gives the key's full name.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from slam_asr.errors import ConfigurationError, StorageError, UserError
from slam_asr.storage.address import is_s3, split_uri

T = TypeVar("T")


def new_parser(**options: Any) -> ArgumentParser:
    """Create a parser that shows the docstring below a field as the help of its option.

    Args:
        options: further arguments of jsonargparse's `ArgumentParser`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(**options)


_MAX_NODES = 100_000
"""Largest number of values in a YAML text, with aliases written out: far more than a recipe or sweep has."""


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a key that is given twice and a key without a value.

    PyYAML's own loader silently takes the last of several values, and reads an empty value as null.
    """

    def __init__(self, text: str | bytes, where: str) -> None:
        super().__init__(text)
        self.where = where
        self.key: list[str] = []
        """The names from the outermost section to the key whose value is being read."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # PyYAML passes the key's node as `index` when it composes the value of that key. Keys themselves,
        # items of lists and the document have no such node.
        if not isinstance(parent, yaml.MappingNode) or not isinstance(index, yaml.ScalarNode):
            return super().compose_node(parent, index)
        self.key.append(index.value)
        for earlier, _ in parent.value:
            if (earlier.tag, earlier.value) == (index.tag, index.value):
                first = earlier.start_mark.line + 1
                self._refuse(index, f"is given twice, first in line {first}: leave one of them out.")
        # PyYAML's types only know an `index` that is a number.
        value = super().compose_node(parent, index)  # type: ignore[arg-type]
        if isinstance(value, yaml.ScalarNode) and not value.value and value.tag == "tag:yaml.org,2002:null":
            self._refuse(index, "has no value: give one, or leave the key out.")
        self.key.pop()
        return value

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MAX_NODES:
            raise ConfigurationError(
                f"{self.where} refers to its own parts (&name, *name) until it has more than {_MAX_NODES:,} "
                "values: write out what is meant."
            )
        return self.construct_document(node)

    def _refuse(self, key: yaml.Node, problem: str) -> None:
        line = key.start_mark.line + 1
        raise ConfigurationError(f"{self.where}, line {line}: {'.'.join(self.key)} {problem}")


def _expanded_size(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the number of values in a YAML text after each alias is replaced by the part that it refers to.

    A few hundred bytes with aliases of aliases can stand for more values than fit in memory. An alias within
    the part that it refers to stands for infinitely many values.
    """
    if id(node) not in known:
        # Until its size is known, the node counts as infinite: a child that refers back to it is a cycle.
        known[id(node)] = math.inf
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in inner)
        known[id(node)] = 1 + sum(_expanded_size(child, known) for pair in pairs for child in pair)
    return known[id(node)]


def read_yaml(text: str | bytes, where: str) -> Any:
    """Read a YAML text.

    Args:
        text: the YAML.
        where: the file's name in error messages: `Recipe demo`.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ConfigurationError: a key is given twice or has no value, or the text cannot be read as values.
    """
    loader = _Loader(text, where)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise ConfigurationError(f"{where} is nested too deeply: correct it.") from None
    # PyYAML's constructors raise ValueError for a date such as 2024-13-45, or an integer of 5000 digits.
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        raise ConfigurationError(f"{where} has a value that is not valid ({error}): correct it.") from None
    finally:
        loader.dispose()


def parse_yaml(text: str | bytes, where: str, example: str) -> dict[str, Any]:
    """Read the keys and values of a YAML text.

    Args:
        text: the YAML.
        where: the file's name in error messages: `Recipe demo`.
        example: a key that such a file may contain, for error messages.

    Raises:
        ConfigurationError: the text is not YAML, contains something other than keys and values, or has a key
            twice or without a value.
    """
    try:
        values = read_yaml(text, where)
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigurationError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"contains {type(values).__name__}"
        raise ConfigurationError(f"{where} must contain keys and values, such as `{example}`; it {found}.")
    return values


def bounded(
    default: T, at_least: float | None = None, at_most: float | None = None, above: float | None = None
) -> T:
    """Give a dataclass's number its default and its bounds. NaN is outside of all bounds.

    Args:
        default: the default value.
        at_least: the smallest value.
        at_most: the largest value.
        above: the value must be larger than this, and finite.

    Returns:
        The dataclass's field. Its declared type is that of the default, as with `dataclasses.field`.
    """
    bounds = {"at least": at_least, "at most": at_most, "above": above}
    set_bounds = {words: limit for words, limit in bounds.items() if limit is not None}
    return field(default=default, metadata=set_bounds)


def bounds_of(key: Field[Any]) -> str:
    """Return a key's bounds in words: `at least 0.0 and at most 0.5`; empty if it has none."""
    return " and ".join(f"{words} {limit}" for words, limit in key.metadata.items())


# These state what is valid, not what is wrong: every comparison with NaN is false, so NaN is refused.
_HOLDS = {
    "at least": lambda value, limit: value >= limit,
    "at most": lambda value, limit: value <= limit,
    "above": lambda value, limit: limit < value < math.inf,
}


def problems(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield a sentence for each value of a dataclass that is out of bounds or contradicts another one.

    A section's contradictions come last. They may rely on its bounds, because callers stop at the first
    sentence.
    """
    for key in fields(section):
        value, name = getattr(section, key.name), prefix + key.name
        if is_dataclass(value):
            yield from problems(value, f"{name}.")
        elif isinstance(value, str):
            yield from problems_of_address(name, value)
        for words, limit in key.metadata.items():
            if value is not None and not _HOLDS[words](value, limit):
                finite = " and finite" if value == math.inf else ""
                yield f"{name} is {value} but must be {words} {limit}{finite}."
    if hasattr(section, "contradictions"):
        yield from section.contradictions()


def problems_of_address(name: str, value: str) -> Iterator[str]:
    """Yield a sentence if a text is an address in object storage that cannot be valid."""
    try:
        if is_s3(value):
            split_uri(value)
    except StorageError as error:
        yield f"{name}: {error}"


def typed(values: dict[str, Any], kind: type[T], where: str) -> T:
    """Build a dataclass from nested dictionaries, with its defaults for the keys that they omit.

    Args:
        values: keys and values; sections are dictionaries.
        kind: the dataclass.
        where: the file's name in error messages.

    Raises:
        UserError: an unknown key, a key without a value or with one of the wrong type, or a value that the
            dataclass itself refuses.
    """
    _check_keys(values, kind, "", where, keys_of(kind))
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
    """Return the full names of all sections and keys: `name`, `training`, `training.max_steps`, …"""
    keys = []
    for f in fields(section):
        keys.append(prefix + f.name)
        if is_dataclass(f.default_factory):
            keys += keys_of(f.default_factory, f"{prefix}{f.name}.")
    return keys


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Return whether a key, given by its full name, is one of some sections or keys, or in one of them."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def as_int(value: Any) -> Any:
    """Return `2` for `2.0`, also within lists; anything else is returned unchanged.

    Kubeflow passes a pipeline's parameter that is a mapping as JSON, in which all numbers are floats.
    """
    if isinstance(value, list):
        return [as_int(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def nearest(word: str, known: list[str]) -> str:
    """Return `; did you mean X?` for the known word closest to a mistyped one, or an empty string.

    An abbreviation by initials counts as close (`lr` for `learning_rate`), and so does a correct name
    without its section (`max_steps` for `training.max_steps`).
    """
    # Initials are compared first, because difflib finds too little similarity between `lr` and
    # `learning_rate`.
    section, _, last = word.rpartition(".")
    for candidate in known:
        candidate_section, _, candidate_last = candidate.rpartition(".")
        initials = "".join(part[0] for part in re.split("[_-]", candidate_last) if part)
        if section in ("", candidate_section) and len(last) > 1 and last == initials:
            return f"; did you mean {candidate}?"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        # Of several keys with the same last part, the first one in `known` remains in the dictionary.
        by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
        close = [by_last[c] for c in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def _check_keys(values: dict[str, Any], section: type, prefix: str, where: str, all_keys: list[str]) -> None:
    """Refuse unknown keys, and two kinds of values that jsonargparse would accept.

    These are null where a value is required, and a section whose value is not a mapping of keys.
    """
    known = {f.name: f for f in fields(section)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key {full}{nearest(full, all_keys) or '.'}")
        inner = known[key].default_factory
        if is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigurationError(f"{where}: {full} must contain keys of its own, not {value!r}.")
            _check_keys(value, inner, f"{full}.", where, all_keys)
        elif value is None and type(None) not in get_args(known[key].type):
            raise ConfigurationError(f"{where}: {full} has no value: give one, or leave the key out.")


def one_sentence(error: Exception) -> str:
    """Return a library's error message about a value as one line in plain words.

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
