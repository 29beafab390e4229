"""Manifests: which utterances there are, where their audio lies, and what is said in them.

A manifest is a file of JSON lines, one utterance each. `key`, `source` and `target` are named as in
SLAM-LLM, so its files are read as they are; `duration`, `sample_rate` and `sha256` are added by
`build-manifest`; any other field is carried along untouched:

    {"key": "1001-134707-0000", "source": "/data/x.flac", "target": "…", "duration": 12.3, "subset": "test-clean"}
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from slam_asr.errors import UserError
from slam_asr.storage import local_path, write_atomically


@dataclass
class Utterance:
    """One stretch of speech and its transcript."""

    key: str
    """Unique in the manifest."""
    source: str
    """The audio file: an absolute local path, or a URI."""
    target: str
    """The transcript."""
    duration: float | None = None
    """Seconds: samples at 16 kHz, divided by 16 000."""
    sample_rate: int | None = None
    """Of the file, in Hz; `audio.load_audio` always gives 16 kHz."""
    sha256: str | None = None
    """Of the audio file's bytes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other fields, as they were."""

    @property
    def subset(self) -> str:
        """The part of the corpus that it comes from, such as `test-other`, or nothing."""
        return str(self.extra.get("subset", ""))

    @property
    def speaker(self) -> str:
        """Who speaks, or nothing where that is not known."""
        return str(self.extra.get("speaker", ""))


def read_manifest(path: str | os.PathLike) -> list[Utterance]:
    """All utterances of a manifest, in the order of its lines.

    Raises:
        UserError: no such file, no utterance in it, or a line that is not one, by file and line.
    """
    first_lines: dict[str, int] = {}
    utterances = []
    for number, utterance in iterate_manifest(path):
        first = first_lines.setdefault(utterance.key, number)
        if first != number:
            raise UserError(
                f"{path}, line {number}: key {utterance.key} is already that of line {first}: keys must be unique."
            )
        utterances.append(utterance)
    if not utterances:
        raise UserError(f"{path} holds no utterance: it must have one JSON object a line with key, source and target.")
    return utterances


def iterate_manifest(path: str | os.PathLike) -> Iterator[tuple[int, Utterance]]:
    """Line numbers and utterances of a manifest; blank lines are passed over, keys may repeat.

    Raises:
        UserError: no such file, or a line that is not an utterance.
    """
    file = local_path(path)
    if file.is_dir():
        raise UserError(
            f"{path} is a folder, not a manifest: name a .jsonl file in it, such as {file / 'train.jsonl'}."
        )
    if not file.is_file():
        raise UserError(f"There is no manifest {path}: check the path, or write one with `slam-asr build-manifest`.")
    folder = os.path.dirname(os.path.abspath(file))
    with open(file, "rb") as lines:
        # Bytes, because text would also be split at line separators that may stand inside a transcript.
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _utterance(line, folder, f"{path}, line {number}")


def write_manifest(path: str | os.PathLike, utterances: Iterable[Utterance]) -> None:
    """Write a manifest whole or not at all, sorted by key: the same utterances give the same bytes."""
    write_json_lines(path, (_fields(u) for u in sorted(utterances, key=lambda u: u.key)))


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A file name that is not UTF-8 becomes a JSON escape and reads back as the same name.
    write_atomically(path, lines.encode("utf-8", "backslashreplace"))


def _fields(utterance: Utterance) -> dict[str, Any]:
    known = {name: getattr(utterance, name) for name in _TYPES}
    return {name: value for name, value in known.items() if value is not None} | utterance.extra


_TYPES = {"key": str, "source": str, "target": str, "duration": float, "sample_rate": int, "sha256": str}
_REQUIRED = ("key", "source", "target")
_IN_WORDS = {str: "text", float: "a number of seconds above 0", int: "a whole number of Hz above 0"}


def _utterance(line: bytes, folder: str, where: str) -> Utterance:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): each line must be one JSON object.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{where} holds {type(values).__name__} where an object with key, source and target must stand."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(f"{where} has no {' and no '.join(missing)}: each line needs key, source and target.")
    known = {name: _checked(name, values.pop(name), where) for name in _TYPES if name in values}
    if "://" not in known["source"]:
        known["source"] = os.path.normpath(os.path.join(folder, known["source"]))
    return Utterance(**known, extra=values)


def _checked(name: str, value: Any, where: str) -> Any:
    kind = _TYPES[name]
    if value is None and name not in _REQUIRED:
        return None
    if kind is str:
        right = isinstance(value, str) and (name == "target" or bool(value.strip()))
        if right and name in ("key", "target") and not _is_unicode(value):
            raise UserError(f"{where}: {name} holds half a character (a lone surrogate): write it as UTF-8.")
    else:
        right = isinstance(value, int | kind) and not isinstance(value, bool) and 0 < value < math.inf
    if not right:
        raise UserError(f"{where}: {name} must be {_IN_WORDS[kind]}, not {json.dumps(value)[:60]}.")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
