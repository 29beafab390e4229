"""Generate docs/reference, the READMEs of the components and the picture of the dashboard's graph.

    python docs/generate.py            write the pages that are out of date, and print their names
    python docs/generate.py --check    exit with 1 and name the pages that are out of date

The code is the only source: the commands and their options come from the stage functions, the keys
of recipes and cluster profiles from their dataclasses, the inputs and outputs of the steps from the
Kubeflow components, the picture from the compiled pipeline. `tests/test_reference.py` runs the check.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from docstring_parser import Docstring, parse, parse_from_object

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `python docs/generate.py` puts docs/ on the path, not the checkout
    sys.path.insert(0, str(ROOT))

REFERENCE = "docs/reference"
NOTE = (
    "<!-- Generated from {source} by docs/generate.py. Do not edit this page: edit its source, then run "
    "`python docs/generate.py`. -->"
)

PIPELINES = {
    "asr": ("pipelines.asr", "run, compile or submit RECIPE"),
    "asr_publishing": (
        "pipelines.asr",
        "the same commands, if the recipe's publish.registry names a registry",
    ),
    "evaluate": ("pipelines.evaluate", "the same commands with --model"),
    "sweep": ("pipelines.sweep", "the same commands with --sweep"),
}


def pages() -> dict[str, str]:
    """Return the text of every generated page, keyed by its path relative to the checkout."""
    texts = {
        f"{REFERENCE}/README.md": _index(),
        f"{REFERENCE}/commands.md": _commands(),
        f"{REFERENCE}/pipelines.md": _pipelines(),
        f"{REFERENCE}/recipe.md": _recipe(),
        f"{REFERENCE}/cluster-profile.md": _cluster_profile(),
        "docs/dashboard-graph.svg": _dashboard_graph(),
    }
    for folder, steps in _steps_by_folder().items():
        texts[f"components/{folder}/README.md"] = _component_readme(folder, steps)
    return {path: text.rstrip("\n") + "\n" for path, text in texts.items()}


def stale_pages(texts: Mapping[str, str]) -> list[str]:
    """Return the paths of the pages whose file is missing or has a different text."""
    return [
        path
        for path, text in texts.items()
        if not (ROOT / path).exists() or (ROOT / path).read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare them if --check is given, and return the exit code."""
    parser = argparse.ArgumentParser(description="Generate the reference pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args(arguments)
    texts = pages()
    stale = stale_pages(texts)
    if options.check:
        for path in stale:
            print(f"{path} is out of date: run `python docs/generate.py`.", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(texts[path], encoding="utf-8")
        print(path)
    return 0


# ── pages ──────────────────────────────────────────────────────────────────────────────────────────


def _index() -> str:
    return "\n".join(
        [
            "# Reference",
            "",
            NOTE.format(source="the code"),
            "",
            "These pages are generated from signatures and docstrings. "
            "`tests/test_reference.py` fails if one is out of date.",
            "",
            *_table(
                ("page", "content"),
                [
                    (
                        "[commands.md](commands.md)",
                        "every `slam-asr` command with its options and its result",
                    ),
                    (
                        "[pipelines.md](pipelines.md)",
                        "the pipelines: commands, parameters of a run, steps",
                    ),
                    ("[recipe.md](recipe.md)", "every key of a recipe"),
                    ("[cluster-profile.md](cluster-profile.md)", "every key of a cluster profile"),
                ],
            ),
        ]
    )


def _commands() -> str:
    from slam_asr.cli import COMMANDS
    from slam_asr.steps import STEPS

    lines = [
        "# Commands of slam-asr",
        "",
        NOTE.format(source="the stage functions"),
        "",
        "Option names use dashes. A list is given as separate values: `--manifests a.jsonl b.jsonl`.",
        "Every path is a local path or `s3://bucket/key`, except that `--api-key-file` must be local, and "
        "`--to` of `copy-models` must be in object storage. A command with `--recipe` accepts every "
        "[recipe key](recipe.md) as an option too, such as `--training.max_steps 200`.",
        "",
        "A trained model contains its recipe. `convert-checkpoint`, `decode`, `score`, `publish`, "
        "`transcribe` and `serve` refuse options for keys that have no effect on such a model; `score` and "
        "`publish` accept all keys if `--recipe` is given. The base models are those of the training, even "
        "if `--recipe` names a recipe with others, unless `--encoder.name` or `--llm.name` is given.",
        "",
        "The pipelines run these stages as their steps: "
        + ", ".join(f"`{name}`" for name, step in STEPS.items() if step.function)
        + ". With `--pointer FILE`, each of them also writes a [pointer](../glossary.md) to its result's "
        "folder, as it does in a pipeline.",
        "",
    ]
    for command, source in COMMANDS.items():
        module, name = source.split(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        lines += [f"## slam-asr {command}", "", *_describe_command(function, command)]
    return "\n".join(lines)


def _pipelines() -> str:
    from pipelines.cli import COMMANDS, USAGE
    from slam_asr.steps import STEPS

    lines = [
        "# Pipelines and their steps",
        "",
        NOTE.format(source="pipelines/ and components/"),
        "",
        "## Commands",
        "",
        "```text",
        *USAGE.rstrip("\n").splitlines(),
        "```",
        "",
    ]
    for command in COMMANDS:
        lines += [
            f"### python -m pipelines {command}",
            "",
            *_table(("option", "default", "meaning"), _pipeline_options(command)),
            "",
        ]
    for name, (module, used_by) in PIPELINES.items():
        lines += _describe_pipeline(getattr(importlib.import_module(module), name), used_by)
    lines += [
        "## Steps",
        "",
        *_table(
            ("step", "image", "inputs", "outputs"),
            [
                (
                    f"[`{step}`](../../components/{_folder_of(step)}/README.md)",
                    f"`{_image_stage(step)}`",
                    ", ".join(f"`{key}`" for key in _component(step).component_spec.inputs or {}),
                    ", ".join(f"`{key}`" for key in _component(step).component_spec.outputs or {}),
                )
                for step in STEPS
            ],
        ),
        "",
    ]
    return "\n".join(lines)


def _recipe() -> str:
    from slam_asr.config.recipe import Recipe

    return "\n".join(
        [
            "# Recipe keys",
            "",
            NOTE.format(source="the dataclasses in slam_asr/config"),
            "",
            "A recipe is a YAML file. Each key is also a command-line option by its full name: "
            "`--training.max_steps 200`.",
            "",
            *_sections(Recipe),
        ]
    )


def _cluster_profile() -> str:
    from pipelines.cluster import Cluster

    return "\n".join(
        [
            "# Cluster profile keys",
            "",
            NOTE.format(source="pipelines/cluster.py"),
            "",
            "A profile is a YAML file that describes one cluster. "
            "It names Kubernetes secrets but never contains one.",
            "",
            *_sections(Cluster),
        ]
    )


def _dashboard_graph() -> str:
    from docs.dashboard_graph import draw
    from pipelines.cluster import load_cluster
    from pipelines.compile import DEFAULT_CLUSTER, compile_package

    with tempfile.TemporaryDirectory() as folder:
        return draw(compile_package(load_cluster(DEFAULT_CLUSTER), Path(folder) / "pipeline.yaml"))


def _component_readme(folder: str, steps: list[str]) -> str:
    from slam_asr.steps import STEPS

    lines = [f"# {folder}", "", NOTE.format(source="the components' signatures"), ""]
    for step in steps:
        component = _component(step)
        document = parse(inspect.getdoc(component.python_func) or "")
        lines += [f"## Step `{step}`", "", *_paragraphs(document), f"Image: `{_image_stage(step)}`.", ""]
        inputs, outputs = component.component_spec.inputs or {}, component.component_spec.outputs or {}
        if inputs:
            lines += _table(
                ("input", "type", "default", "meaning"),
                [
                    (
                        f"`{key}`",
                        _kfp_type(spec.type, spec.is_artifact_list),
                        _default(spec.default) if spec.optional else "required",
                        _argument(document, key),
                    )
                    for key, spec in inputs.items()
                ],
            )
            lines.append("")
        if outputs:
            lines += _table(
                ("output", "type", "meaning"),
                [
                    (
                        f"`{key}`",
                        _kfp_type(spec.type, spec.is_artifact_list),
                        _argument(document, key) or _returns(document),
                    )
                    for key, spec in outputs.items()
                ],
            )
            lines.append("")
        if STEPS[step].function:
            heading = f"slam-asr {step}".replace(" ", "-")
            lines += [
                f"On the command line: [`slam-asr {step}`](../../{REFERENCE}/commands.md#{heading}).",
                "",
            ]
    return "\n".join(lines)


# ── parts of pages ─────────────────────────────────────────────────────────────────────────────────


def _describe_pipeline(pipeline: Any, used_by: str) -> Iterator[str]:
    """Yield a pipeline's description, the commands that use it, and its parameters."""
    document = parse(inspect.getdoc(pipeline.pipeline_func) or "")
    yield from (f"## Pipeline `{pipeline.name}`", "", *_paragraphs(document), f"Used by: {used_by}.", "")
    yield from _table(
        ("parameter", "type", "default", "meaning"),
        [
            (
                f"`{key}`",
                _kfp_type(spec.type),
                _default(spec.default) if spec.optional else "required",
                _argument(document, key),
            )
            for key, spec in pipeline.component_spec.inputs.items()
        ],
    )
    yield ""


def _describe_command(function: Callable[..., Any], command: str) -> Iterator[str]:
    """Yield a command's description, usage, options, result and errors."""
    document = parse(inspect.getdoc(function) or "")
    parameters = inspect.signature(function).parameters
    yield from _paragraphs(document)
    yield from ("```text", f"slam-asr {command} {_usage(command, parameters)}".rstrip(), "```", "")
    rows: list[tuple[str, str, str, str]] = []
    for name, parameter in parameters.items():
        if name != "recipe" and dataclasses.is_dataclass(parameter.annotation):
            rows += _fields_as_options(_option(name), parameter.annotation)
            continue
        default = "the model's" if _is_optional_recipe(name, parameters) else _default_of(parameter)
        rows.append((f"`{_option(name)}`", _type(parameter.annotation), default, _argument(document, name)))
    yield from _table(("option", "type", "default", "meaning"), rows)
    yield ""
    if document.returns and parameters:
        yield from (f"**Result.** {_sentence(document.returns.description)}", "")
    if document.raises:
        reasons = " ".join(_sentence(error.description) for error in document.raises)
        yield from (f"**Errors.** {reasons}", "")


def _fields_as_options(option: str, section: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each field of a dataclass that a command takes as an option."""
    from slam_asr.config.schema import bounds_of

    document = parse_from_object(section)
    for field in dataclasses.fields(section):
        kind = ", ".join(filter(None, [_type(field.type), bounds_of(field)]))
        default = _default(_field_default(field))
        yield f"`{option}.{field.name}`", kind, default, _argument(document, field.name)


class _ParserBuilt(Exception):
    """Raised to carry a command's parser out of the command before it parses anything."""


def _pipeline_options(command: str) -> Iterator[tuple[str, str, str]]:
    """Yield (option, default, meaning) of a `python -m pipelines` command, without the recipe's keys."""
    from jsonargparse import ArgumentParser

    from pipelines.cli import COMMANDS
    from slam_asr.config.recipe import recipe_keys

    def stop(parser: ArgumentParser, *_: Any, **__: Any) -> None:
        raise _ParserBuilt(parser)

    module, name = COMMANDS[command].function.split(":")
    takes_recipe = "RECIPE" in COMMANDS[command].positionals
    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            getattr(importlib.import_module(module), name)(["demo"] if takes_recipe else ["RUN"])
        except _ParserBuilt as built:
            (parser,) = built.args
    of_recipe = {key.partition(".")[0] for key in recipe_keys()} | {"help", "recipe"}
    for action in parser._actions:  # argparse has no public list of a parser's options
        if action.dest.partition(".")[0] not in of_recipe and action.option_strings:
            # If the help describes the default, the parser's own default (None, or 0 for "all") is not shown.
            default = "" if "default:" in action.help else _default(action.default)
            yield f"`{action.option_strings[0]}`", default, _sentence(action.help)


def _usage(command: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return the required options. Those that can be positional come first, without their names."""
    from slam_asr.cli import positionals_of

    words = positionals_of(command).split()
    positional = [word.rstrip("…").lower() for word in words]
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and not _is_optional_recipe(name, parameters)
        if required and name not in positional:
            words.append(f"{_option(name)} {_placeholder(name, parameter.annotation)}")
    return " ".join(words)


def _is_optional_recipe(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a parameter is a recipe that may be omitted, because a model folder contains its own."""
    return name == "recipe" and "model" in parameters


def _default_of(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is parameter.empty else _default(parameter.default)


def _sections(top: type) -> Iterator[str]:
    """Yield a table for each section of a nested dataclass; sections of the same class share one."""
    from slam_asr.config.schema import bounds_of

    sections: dict[type, list[str]] = {}
    for prefix, section in _dataclasses_in(top):
        sections.setdefault(section, []).append(prefix)
    for section, prefixes in sections.items():
        document = parse_from_object(section)
        title = ", ".join(f"`{prefix}`" for prefix in prefixes if prefix) or "Top level"
        yield from (f"## {title}", "", *_paragraphs(document))
        key = prefixes[0] + "." if len(prefixes) == 1 and prefixes[0] else ""
        yield from _table(
            ("key", "type", "default", "meaning"),
            [
                (
                    f"`{key}{field.name}`",
                    ", ".join(filter(None, [_type(field.type), bounds_of(field)])),
                    _default(_field_default(field)),
                    _argument(document, field.name),
                )
                for field in dataclasses.fields(section)
                if not dataclasses.is_dataclass(field.type)
            ],
        )
        yield ""


def _dataclasses_in(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield (prefix, class) of each section that has keys of its own, not only subsections."""
    if any(not dataclasses.is_dataclass(field.type) for field in dataclasses.fields(section)):
        yield prefix, section
    for field in dataclasses.fields(section):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _dataclasses_in(field.type, f"{prefix}.{field.name}".lstrip("."))


def _steps_by_folder() -> dict[str, list[str]]:
    from slam_asr.steps import STEPS

    folders: dict[str, list[str]] = {}
    for step in STEPS:
        folders.setdefault(_folder_of(step), []).append(step)
    for folder, steps in folders.items():  # the folder's own step first
        folders[folder] = sorted(steps, key=[step.replace("_", "-") for step in (folder, *steps)].index)
    return folders


def _component(step: str) -> Any:
    from components import component_of

    return component_of(step)


def _image_stage(step: str) -> str:
    from slam_asr.steps import STEPS

    return STEPS[step].image or step


def _folder_of(step: str) -> str:
    return _image_stage(step).replace("-", "_")


# ── Markdown ───────────────────────────────────────────────────────────────────────────────────────


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _paragraphs(document: Docstring) -> Iterator[str]:
    """Yield the docstring's first line and its further paragraphs, an empty line after each."""
    for text in (document.short_description, document.long_description):
        for paragraph in (text or "").split("\n\n"):
            if paragraph.strip():
                yield from (re.sub(r"\s+", " ", paragraph.strip()), "")


def _argument(document: Docstring, name: str) -> str:
    described = [p.description for p in document.params if p.arg_name == name]
    return _sentence(described[0]) if described else ""


def _returns(document: Docstring) -> str:
    return _sentence(document.returns.description) if document.returns else ""


def _sentence(text: str | None) -> str:
    """Return a text on one line, with a capital at the start and a full stop at the end."""
    text = re.sub(r"\s+", " ", text or "").strip()
    if text and text[-1] not in ".!?…`":
        text += "."
    # A name that is spelled as in code is not capitalised.
    return text if re.match(r"[a-z]\w*[./_:(]", text) else text[:1].upper() + text[1:]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _placeholder(name: str, annotation: Any) -> str:
    word = name.upper().replace("_", "-")
    return f"{word} …" if typing.get_origin(annotation) is list else word


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        # A line break would end the table's row.
        return f"`{value}`" if value == value.strip() and "\n" not in value else f"`{json.dumps(value)}`"
    if isinstance(value, list | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _field_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type(annotation: Any) -> str:
    """Describe a type in the words of the command line."""
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return "list" if arguments == (str,) else f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    return (
        "recipe" if getattr(annotation, "__name__", "") == "Recipe" else inspect.formatannotation(annotation)
    )


def _kfp_type(name: str, several: bool = False) -> str:
    """Describe a KFP type: `system.Dataset@0.0.1` → `Dataset`."""
    short = re.sub(r"^system\.|@.*$", "", name)
    words = {
        "String": "text",
        "Integer": "integer",
        "Double": "number",
        "Boolean": "boolean",
        "Dict": "mapping",
        "List": "list",
    }
    text = words.get(short, f"`{short}`" if short[:1].isupper() else short.lower())
    return f"list of {text}" if several else text


if __name__ == "__main__":
    sys.exit(main())
