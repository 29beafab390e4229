"""Manifests: which utterances there are, where their audio lies, and what is said in them.

A manifest is a file of JSON lines, one utterance each. `key`, `source` and `target` are named as in
SLAM-LLM, so its files are read as they are; `duration`, `sample_rate` and `sha256` are added by
`build-manifest`, `start` where an utterance is a stretch of a longer file; any other field is carried
along untouched:

    {"key": "1001-134707-0000", "source": "/data/x.flac", "target": "…", "duration": 12.3, "subset": "test-clean"}

Manifests may have millions of lines: they are validated in a stream, kept as a file with the places of
its lines, and written through a sort on disk.
"""

import json
import math
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
import xxhash

from slam_asr.errors import UserError
from slam_asr.sorting import SortedLines
from slam_asr.storage import exists, fetch, is_s3, local_path, parent_of, resolve, upload
from slam_asr.storage.local import written_whole


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
    start: float | None = None
    """Seconds into the file at which it begins, for `duration`; absent where it is the whole file."""

    @property
    def subset(self) -> str:
        """The part of the corpus that it comes from, such as `test-other`, or nothing."""
        return str(self.extra.get("subset", ""))

    @property
    def speaker(self) -> str:
        """Who speaks, or nothing where that is not known."""
        return str(self.extra.get("speaker", ""))


class Manifest(Sequence[Utterance]):
    """A manifest's utterances in the order of its lines, each read from the file when it is asked for.

    In memory are the places of the lines, 8 bytes each. It can be sent to other processes.

    Args:
        path: as the user named it.
        offsets: [lines] at which byte of the file each utterance's line begins.
    """

    def __init__(self, path: str | os.PathLike, offsets: np.ndarray) -> None:
        self.path, self.offsets = os.fspath(path), offsets
        self._folder = parent_of(path)
        self._mapped: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Utterance]:
        return (utterance for _, _, utterance in _stream(self.path))

    @overload
    def __getitem__(self, at: int) -> Utterance: ...
    @overload
    def __getitem__(self, at: slice) -> list[Utterance]: ...
    def __getitem__(self, at: int | slice) -> Utterance | list[Utterance]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        mapped = self._mapped or self._map()
        begin = int(self.offsets[at])
        end = mapped.find(b"\n", begin)
        return _utterance(mapped[begin : end if end >= 0 else len(mapped)], self._folder, self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def _map(self) -> mmap.mmap:
        with open(fetch(self.path), "rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped


def read_manifest(path: str | os.PathLike) -> Manifest:
    """A manifest, all of its lines validated.

    Raises:
        UserError: no such file, no utterance in it, or a line that is not one, by file and line.
    """
    offsets, keys = array("q"), array("Q")
    for _, offset, utterance in _stream(path):
        offsets.append(offset)
        keys.append(xxhash.xxh3_64_intdigest(utterance.key.encode()))
    if not offsets:
        raise UserError(f"{path} holds no utterance: it must have one JSON object a line with key, source and target.")
    manifest = Manifest(path, np.frombuffer(offsets, np.int64))
    _refuse_repeated_keys(manifest, np.frombuffer(keys, np.uint64))
    return manifest


def _refuse_repeated_keys(manifest: Manifest, hashes: np.ndarray) -> None:
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    # Only keys whose hashes are equal are looked at, in the order of the lines that repeat one.
    for later in np.sort(order[alike + 1]).tolist():
        key = manifest[later].key
        for earlier in np.flatnonzero(hashes[:later] == hashes[later]).tolist():
            if manifest[earlier].key == key:
                first, second = (_line_of(manifest, row) for row in (earlier, later))
                raise UserError(
                    f"{manifest.path}, line {second}: key {key} is already that of line {first}: keys must be unique."
                )


def _line_of(manifest: Manifest, row: int) -> int:
    """Number of an utterance's line, from 1."""
    with open(fetch(manifest.path), "rb") as file:
        return file.read(int(manifest.offsets[row])).count(b"\n") + 1


def iterate_manifest(path: str | os.PathLike) -> Iterator[tuple[int, Utterance]]:
    """Line numbers and utterances of a manifest; blank lines are passed over, keys may repeat.

    Raises:
        UserError: no such file, or a line that is not an utterance.
    """
    return ((number, utterance) for number, _, utterance in _stream(path))


def _stream(path: str | os.PathLike) -> Iterator[tuple[int, int, Utterance]]:
    """Line numbers, places in the file, and utterances."""
    folder = parent_of(path)
    offset = 0
    with open(_file_of(path), "rb") as lines:
        # Bytes, because text would also be split at line separators that may stand inside a transcript.
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, offset, _utterance(line, folder, path, number)
            offset += len(line)


def _file_of(path: str | os.PathLike) -> Path:
    """A manifest's file on local disk."""
    if is_s3(path):
        if not exists(path):
            raise UserError(f"There is no manifest {path}: check the address, or write one with `slam-asr build-manifest`.")
        return fetch(path)
    file = local_path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder, not a manifest: name a .jsonl file in it, such as {file / 'train.jsonl'}.")
    if not file.is_file():
        raise UserError(f"There is no manifest {path}: check the path, or write one with `slam-asr build-manifest`.")
    return file


def write_manifest(path: str | os.PathLike, utterances: Iterable[Utterance]) -> None:
    """Write a manifest whole or not at all, sorted by key: the same utterances give the same bytes."""
    with SortedLines() as lines:
        for utterance in utterances:
            lines.add(utterance.key, to_line(utterance))
        write_lines(path, (line for _, line in lines))


def to_line(utterance: Utterance) -> bytes:
    """An utterance as its line in a manifest."""
    return as_line(_fields(utterance))


def as_line(row: dict[str, Any]) -> bytes:
    """A JSON object as a line."""
    # A file name that is not UTF-8 becomes a JSON escape and reads back as the same name.
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_lines(path, map(as_line, rows))


def write_lines(path: str | os.PathLike, lines: Iterable[bytes]) -> None:
    """Write lines as they come, visible when all are there."""
    if is_s3(path):
        with TemporaryDirectory(prefix="slam-asr-") as folder:
            write_lines(Path(folder) / "lines", lines)
            upload(Path(folder) / "lines", path)
        return
    with written_whole(local_path(path)) as file:
        file.writelines(lines)


def _fields(utterance: Utterance) -> dict[str, Any]:
    known = {name: getattr(utterance, name) for name in _TYPES}
    return {name: value for name, value in known.items() if value is not None} | utterance.extra


_TYPES = {"key": str, "source": str, "target": str, "duration": float, "sample_rate": int, "sha256": str, "start": float}
_REQUIRED = ("key", "source", "target")
_IN_WORDS = {str: "text", float: "a number of seconds above 0", int: "a whole number of Hz above 0"}


def _utterance(line: bytes, folder: str, path: str | os.PathLike, number: int | None = None) -> Utterance:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_where(path, number)} is not JSON ({error}): each line must be one JSON object.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{_where(path, number)} holds {type(values).__name__} where an object with key, source and target must stand."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(f"{_where(path, number)} has no {' and no '.join(missing)}: each line needs key, source and target.")
    known = {name: values.pop(name) for name in _TYPES if name in values}
    for name, value in known.items():
        _check(name, value, path, number)
    if known.get("start") is not None and known.get("duration") is None:
        raise UserError(f"{_where(path, number)} has a start but no duration: a stretch of a file needs both.")
    if "://" not in known["source"]:
        known["source"] = resolve(known["source"], folder)
    return Utterance(**known, extra=values)


def _where(path: str | os.PathLike, number: int | None) -> str:
    return f"{path}, line {number}" if number else f"A line of {path}"


def _check(name: str, value: Any, path: str | os.PathLike, number: int | None) -> None:
    kind = _TYPES[name]
    if value is None and name not in _REQUIRED:
        return
    if kind is str:
        right = isinstance(value, str) and (name == "target" or bool(value.strip()))
        if right and name in ("key", "target") and not _is_unicode(value):
            raise UserError(f"{_where(path, number)}: {name} holds half a character (a lone surrogate): write it as UTF-8.")
    else:
        right = isinstance(value, int | kind) and not isinstance(value, bool) and value < math.inf
        right = right and (value >= 0 if name == "start" else value > 0)
    if not right:
        words = "a number of seconds from 0 on" if name == "start" else _IN_WORDS[kind]
        raise UserError(f"{_where(path, number)}: {name} must be {words}, not {json.dumps(value)[:60]}.")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
