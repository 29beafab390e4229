"""Manifests: which utterances there are, where their audio lies, and what is said in them.

A manifest is a file of JSON lines, one utterance each. `key`, `source` and `target` are named as in
SLAM-LLM, so its files are read as they are; `duration`, `sample_rate` and `sha256` are added by
`build-manifest`; `start` makes the utterance a segment of a longer file; any other field is carried
along untouched:

    {"key": "1001-134707-0000", "source": "/data/x.flac", "target": "…", "duration": 12.3, "subset": "test-clean"}

A manifest may hold millions of lines and lie in object storage: it is read line by line, checked
whole, and sorted through local disk, in memory that does not grow with the length of its lines.
"""

import hashlib
import json
import math
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from slam_asr.audio import audio_sha256
from slam_asr.errors import UserError
from slam_asr.external_sort import ExternalSort
from slam_asr.storage import exists, fetch, is_s3, local_path, name_of, parent_of, resolve, upload
from slam_asr.storage.cache import cache_folder


@dataclass
class Utterance:
    """One stretch of speech and its transcript."""

    key: str
    """Unique in the manifest."""
    source: str
    """The audio file: an absolute local path, or a URI."""
    target: str
    """The transcript."""
    start: float | None = field(default=None, kw_only=True)
    """Seconds into the file where it begins; absent: it is the whole file."""
    duration: float | None = None
    """Seconds, of the segment where there is a `start`: samples at 16 kHz, divided by 16 000."""
    sample_rate: int | None = None
    """Of the file, in Hz; `audio.load_audio` always gives 16 kHz."""
    sha256: str | None = None
    """Of the whole audio file's bytes."""
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

    @property
    def audio_id(self) -> str:
        """Identifies the audio by its content: 64 hexadecimal digits, the key of its features in a store.

        For a complete file this is the SHA-256 of the file's bytes. For a segment it is a digest of that
        SHA-256 and the segment's start and duration. The file is read if the manifest has no `sha256`.

        Raises:
            AudioError: the manifest has no `sha256`, and the file is missing.
        """
        sha256 = self.sha256 or audio_sha256(self.source)
        if self.start is None:
            return sha256
        return hashlib.sha256(f"{sha256}/{self.start:.6f}/{self.duration:.6f}".encode()).hexdigest()


class Manifest(Sequence[Utterance]):
    """The utterances of a manifest, in the order of its lines, each parsed when it is asked for.

    Holds where each line begins (8 bytes an utterance), not what it says. Threads and forked processes
    may share one; it can be pickled, and then needs the file to be there where it is used. Made by
    `read_manifest`.
    """

    def __init__(self, path: str | os.PathLike, offsets: np.ndarray) -> None:
        self.path = _absolute(path)
        self._offsets = offsets
        """int64 [utterances + 1]: where each line begins, and where the last one ends."""
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        file = self._file
        if file is None:
            # Of threads that come here together, each has a file of its own until it is done with it.
            file = self._file = open(fetch(self.path), "rb", buffering=0)  # noqa: SIM115 - closed with the object
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        # Not seek and read: threads and forked processes share the file's position.
        line = os.pread(file.fileno(), end - start, start)
        return _utterance(line, parent_of(self.path), self._place(position))

    def __iter__(self) -> Iterator[Utterance]:
        folder = parent_of(self.path)
        lines = _lines(fetch(self.path))
        for position, (_, _, line) in zip(range(len(self)), lines, strict=False):
            yield _utterance(line, folder, self._place(position))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Manifest({self.path!r}, {len(self)} utterances)"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}

    def _place(self, position: int) -> Callable[[], str]:
        return lambda: f"{self.path}, utterance {position + 1} (changed since it was first read)"


def read_manifest(path: str | os.PathLike) -> Manifest:
    """All utterances of a manifest, in the order of its lines; every line is checked now.

    Raises:
        UserError: no such file, no utterance in it, or a line that is not one, by file and line.
    """
    file = _manifest_file(path)
    offsets, hashes = array("q"), array("q")
    for number, offset, line in _lines(file):
        key = _checked_fields(line, _place(path, number))["key"]
        offsets.append(offset)
        hashes.append(hash(key))
    if not offsets:
        raise UserError(
            f"{path} holds no utterance: it must have one JSON object a line with key, source and target."
        )
    _refuse_repeated_keys(path, file, np.frombuffer(hashes, np.int64))
    offsets.append(os.path.getsize(file))
    return Manifest(path, np.frombuffer(offsets, np.int64))


def iterate_manifest(path: str | os.PathLike) -> Iterator[tuple[int, Utterance]]:
    """Line numbers and utterances of a manifest; blank lines are passed over, keys may repeat.

    Raises:
        UserError: no such file, or a line that is not an utterance.
    """
    file = _manifest_file(path)
    folder = parent_of(_absolute(path))
    for number, _, line in _lines(file):
        yield number, _utterance(line, folder, _place(path, number))


def write_manifest(path: str | os.PathLike, utterances: Iterable[Utterance]) -> None:
    """Write a manifest whole or not at all, sorted by key: the same utterances give the same bytes.

    Args:
        path: a local path or s3://.
        utterances: in any order and number; sorted through local disk where they are many.
    """
    with ExternalSort(_workplace(path)) as ordered:
        for utterance in utterances:
            ordered.add(utterance.key.encode("utf-8", "backslashreplace"), manifest_line(utterance))
        write_lines(path, (line for _, line in ordered))


def manifest_line(utterance: Utterance) -> bytes:
    """An utterance as it stands in a manifest, with the line's end."""
    return json_line(_fields(utterance))


def parse_line(line: bytes) -> Utterance:
    """An utterance from a line that `manifest_line` made; its source stays as it is written."""
    extra = json.loads(line)
    return Utterance(**{name: extra.pop(name) for name in _TYPES if name in extra}, extra=extra)


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_lines(path, map(json_line, rows))


def json_line(row: dict[str, Any]) -> bytes:
    """A JSON object as one line; a file name that is not UTF-8 becomes an escape and reads back as the same name."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_lines(path: str | os.PathLike, lines: Iterable[bytes]) -> None:
    """Write lines to a local file or an object as they come; they are visible whole or not at all."""
    remote = is_s3(path)
    name = name_of(path)[:200]
    aside = _workplace(path) / f".{name}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with open(aside, "wb") as file:
            file.writelines(lines)
            file.flush()
            if not remote:
                os.fsync(file.fileno())
        if remote:
            upload(aside, path)
        else:
            os.replace(aside, local_path(path))
    except OSError as error:
        if error.filename not in (None, str(aside)):
            raise
        # The name the user knows, not the one aside.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _workplace(path: str | os.PathLike) -> Path:
    """Where what is not finished lies: beside a local file, or in the cache folder for an object."""
    folder = cache_folder() / "work" if is_s3(path) else local_path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _absolute(path: str | os.PathLike) -> str:
    return os.fspath(path) if is_s3(path) else str(local_path(path).absolute())


def _manifest_file(path: str | os.PathLike) -> Path:
    """A manifest on local disk; it is fetched from object storage first."""
    remedy = "check the path, or write one with `slam-asr build-manifest`."
    if is_s3(path):
        if not exists(path):
            raise UserError(f"There is no manifest {path}: {remedy}")
        return fetch(path)
    file = local_path(path)
    if file.is_dir():
        raise UserError(
            f"{path} is a folder, not a manifest: name a .jsonl file in it, such as {file / 'train.jsonl'}."
        )
    if not file.is_file():
        raise UserError(f"There is no manifest {path}: {remedy}")
    return file


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in bytes and content of each line that is not blank."""
    offset = 0
    with open(file, "rb", buffering=2**20) as lines:
        # Bytes, because text would also be split at line separators that may stand inside a transcript.
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


def _refuse_repeated_keys(path: str | os.PathLike, file: Path, hashes: np.ndarray) -> None:
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    first_lines: dict[str, int] = {}
    for (number, _, line), value in zip(_lines(file), hashes.tolist(), strict=True):
        if value not in suspects:
            continue
        key = _checked_fields(line, _place(path, number))["key"]
        first = first_lines.setdefault(key, number)
        if first != number:
            raise UserError(
                f"{path}, line {number}: key {key} is already that of line {first}: keys must be unique."
            )


def _fields(utterance: Utterance) -> dict[str, Any]:
    known = {name: getattr(utterance, name) for name in _TYPES}
    return {name: value for name, value in known.items() if value is not None} | utterance.extra


_TYPES = {
    "key": str,
    "source": str,
    "target": str,
    "start": float,
    "duration": float,
    "sample_rate": int,
    "sha256": str,
}
_REQUIRED = ("key", "source", "target")
_OPTIONAL = tuple(name for name in _TYPES if name not in _REQUIRED)
_IN_WORDS = {
    "start": "a number of seconds, 0 or more",
    "duration": "a number of seconds above 0",
    "sample_rate": "a whole number of Hz above 0",
}

Place = Callable[[], str]
"""File and line in words; put together only for a line that is refused."""


def _place(path: str | os.PathLike, number: int) -> Place:
    return lambda: f"{path}, line {number}"


def _utterance(line: bytes, folder: str, where: Place) -> Utterance:
    extra = _checked_fields(line, where)
    known = {name: extra.pop(name) for name in _TYPES if name in extra}
    known["source"] = resolve(known["source"], folder)
    return Utterance(**known, extra=extra)


def _checked_fields(line: bytes, where: Place) -> dict[str, Any]:
    """What a line says, its known fields being right."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where()} is not JSON ({error}): each line must be one JSON object.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{where()} holds {type(values).__name__} where an object with key, source and target must stand."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise UserError(
            f"{where()} has no {' and no '.join(missing)}: each line needs key, source and target."
        )
    for name in _REQUIRED:
        _check_text(name, values[name], where)
    for name in _OPTIONAL:
        if values.get(name) is not None:
            _check_optional(name, values[name], where)
    if values.get("start") is not None and values.get("duration") is None:
        raise UserError(f"{where()} has a start but no duration: a segment of a file needs both.")
    return values


def _check_text(name: str, value: Any, where: Place) -> None:
    if not isinstance(value, str) or not (name == "target" or value.strip()):
        raise UserError(f"{where()}: {name} must be text, not {json.dumps(value)[:60]}.")
    if name in ("key", "target") and not _is_unicode(value):
        raise UserError(f"{where()}: {name} holds half a character (a lone surrogate): write it as UTF-8.")


def _check_optional(name: str, value: Any, where: Place) -> None:
    if _TYPES[name] is str:
        _check_text(name, value, where)
        return
    kinds = int if name == "sample_rate" else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < math.inf
    if not right or (value == 0 and name != "start"):
        raise UserError(f"{where()}: {name} must be {_IN_WORDS[name]}, not {json.dumps(value)[:60]}.")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
