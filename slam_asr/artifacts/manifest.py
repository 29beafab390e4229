"""Manifests: lists of utterances, each with its audio file and its transcript.

A manifest is a file of JSON lines, with one utterance per line. `key`, `source` and `target` have the same
names as in SLAM-LLM, so SLAM-LLM's files can be read without conversion. `build-manifest` adds `duration`,
`sample_rate` and `sha256`. With `start`, the utterance is a segment of a longer file, and with
`audio_channel` it is one channel of the file. Any other field is passed through unchanged. An example:

    {"key": "1001-134707-0000", "source": "/data/x.flac", "target": "…", "duration": 12.3, "subset": "test"}

A manifest may have millions of lines and may be in object storage. It is read line by line, and every line
is checked. Memory grows with the number of lines, but not with their length.
"""

import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from slam_asr.artifacts.json_lines import json_line
from slam_asr.audio import audio_sha256
from slam_asr.errors import InputError
from slam_asr.storage import PathOrUri, exists, fetch, is_s3, local_path, parent_of, resolve, sha256_of_bytes


@dataclass
class Utterance:
    """A stretch of speech and its transcript."""

    key: str
    """Unique in the manifest."""
    source: str
    """The audio file: an absolute local path, or a URI."""
    target: str
    """The transcript."""
    start: float | None = field(default=None, kw_only=True)
    """Where the segment begins in the file, in seconds. None if the utterance is the complete file."""
    audio_channel: int | None = field(default=None, kw_only=True)
    """Number of the channel of the file to use, counted from 0. None for the mean of all channels."""
    duration: float | None = None
    """Length in seconds of the segment, or of the file if `start` is None: the number of samples after
    resampling to 16 kHz, divided by 16,000."""
    sample_rate: int | None = None
    """The file's own rate in Hz; `audio.load_audio` always resamples to 16 kHz."""
    sha256: str | None = None
    """SHA-256 of the bytes of the complete audio file, even if the utterance is a segment of it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other fields of the line, unchanged."""

    @property
    def subset(self) -> str:
        """The part of the corpus that the utterance comes from, such as `test-other`; empty if unknown."""
        return self._extra("subset")

    @property
    def speaker(self) -> str:
        """The speaker's name or number; empty if unknown."""
        return self._extra("speaker")

    @property
    def language(self) -> str:
        """Name or code of the language, such as `en`, from the fields `language` or `locale`; or empty."""
        return self._extra("language") or self._extra("locale")

    def _extra(self, field: str) -> str:
        value = self.extra.get(field)
        return "" if value is None else str(value)

    @property
    def audio_id(self) -> str:
        """Identifier of the audio's content in 64 hexadecimal digits. Feature stores use it as the key.

        For a complete file, this is the SHA-256 of the file's bytes. For a segment, it is a digest of that
        SHA-256 and of the segment's start and duration. If one channel of the file is used, its number is
        part of the digest too. The file is read if the manifest has no `sha256`.

        Raises:
            AudioError: the manifest has no `sha256`, and the file is missing.
        """
        sha256 = self.sha256 or audio_sha256(self.source)
        parts = [] if self.start is None else [f"{self.start:.6f}", f"{self.duration:.6f}"]
        if self.audio_channel is not None:
            parts.append(f"channel {self.audio_channel}")
        return sha256_of_bytes("/".join([sha256, *parts]).encode()) if parts else sha256


class Manifest(Sequence[Utterance]):
    """The utterances of a manifest in file order. An utterance is parsed when it is accessed.

    Memory holds the offset of each line (8 bytes per utterance) instead of its content. Threads and forked
    processes may share an instance. `read_manifest` creates instances.
    """

    def __init__(self, path: PathOrUri, offsets: np.ndarray) -> None:
        self.path = _absolute(path)
        self._offsets = offsets
        """int64 [utterances + 1]: the offset of each utterance's line in bytes, then the size of the file."""
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
        i = range(len(self))[index]
        file = self._file
        if file is None:
            # Two threads may both open the file here, and the attribute then refers to only one of the two.
            # The local variable keeps a thread's own file open until the thread has read from it.
            file = self._file = open(fetch(self.path), "rb", buffering=0)  # noqa: SIM115 - closed with the object
        start, end = int(self._offsets[i]), int(self._offsets[i + 1])
        # pread instead of seek and read, because threads and forked processes share the file's position.
        # Blank lines before the next utterance are read too. They are removed, because they may contain form
        # feeds, which JSON does not permit.
        line = os.pread(file.fileno(), end - start, start).rstrip()
        return _utterance(line, parent_of(self.path), self._location(i))

    def __iter__(self) -> Iterator[Utterance]:
        folder = parent_of(self.path)
        lines = _lines(fetch(self.path))
        # Not strict: lines that were appended since the manifest was opened are not part of it.
        for i, (_, _, line) in zip(range(len(self)), lines, strict=False):
            yield _utterance(line, folder, self._location(i))

    def _location(self, i: int) -> "Location":
        return lambda: f"{self.path}, utterance {i + 1} (changed since it was first read)"


def read_manifest(path: PathOrUri) -> Manifest:
    """Open a manifest and check every line of it.

    Args:
        path: a local path or an s3:// URI.

    Raises:
        InputError: the file is missing or contains no utterances, a line is not an utterance, or a key is
            repeated.
    """
    file = _manifest_file(path)
    offsets, hashes = array("q"), array("q")
    for number, offset, line in _lines(file):
        key = _checked_fields(line, _location(path, number))["key"]
        offsets.append(offset)
        hashes.append(hash(key))
    if not offsets:
        raise InputError(
            f"{path} holds no utterance: each line must be a JSON object with key, source and target."
        )
    _refuse_repeated_keys(path, file, np.frombuffer(hashes, np.int64))
    offsets.append(os.path.getsize(file))
    return Manifest(path, np.frombuffer(offsets, np.int64))


def iterate_manifest(path: PathOrUri) -> Iterator[tuple[int, Utterance]]:
    """Read a manifest line by line; yield the line number (from 1) and the utterance of each line.

    Blank lines are skipped. Repeated keys are not noticed, because that would need memory for all keys.

    Raises:
        InputError: the file is missing, or a line is not an utterance.
    """
    file = _manifest_file(path)
    folder = parent_of(_absolute(path))
    for number, _, line in _lines(file):
        yield number, _utterance(line, folder, _location(path, number))


def manifest_line(utterance: Utterance) -> bytes:
    """Format an utterance as a line of a manifest, with the newline."""
    known = {name: getattr(utterance, name) for name in _TYPES}
    return json_line({name: value for name, value in known.items() if value is not None} | utterance.extra)


def parse_line(line: bytes) -> Utterance:
    """Parse a line that `manifest_line` wrote. Nothing is checked, and a relative `source` stays relative."""
    return _from_fields(json.loads(line))


def _absolute(path: PathOrUri) -> str:
    return os.fspath(path) if is_s3(path) else str(local_path(path).absolute())


def _manifest_file(path: PathOrUri) -> Path:
    """Return a manifest's path on local disk, after fetching it if it is in object storage."""
    if not is_s3(path) and (folder := local_path(path)).is_dir():
        raise InputError(
            f"{path} is a folder, not a manifest: give a .jsonl file in it, such as {folder / 'train.jsonl'}."
        )
    if not exists(path):
        raise InputError(
            f"There is no manifest {path}: check the path, or write one with `slam-asr build-manifest`."
        )
    return fetch(path)


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number (from 1), offset in bytes and content of each line that is not blank."""
    offset = 0
    with open(file, "rb", buffering=2**20) as lines:
        # The file is read as bytes, because offsets count bytes, and because str.splitlines would also split
        # inside a transcript, for example at U+2028.
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


def _refuse_repeated_keys(path: PathOrUri, file: Path, hashes: np.ndarray) -> None:
    """Raise if two lines have the same key.

    Keys are first compared by their hashes, which need 8 bytes per utterance. Only lines whose hashes are
    equal are parsed again.

    Args:
        path: the manifest's name, for error messages.
        file: the manifest on local disk.
        hashes: int64 [utterances], the hash of each line's key.
    """
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    first_lines: dict[str, int] = {}
    for (number, _, line), value in zip(_lines(file), hashes.tolist(), strict=True):
        if value not in suspects:
            continue
        key = _checked_fields(line, _location(path, number))["key"]
        first = first_lines.setdefault(key, number)
        if first != number:
            raise InputError(
                f"{path}, line {number}: key {key} is already used in line {first}: keys must be unique."
            )


_TYPES = {"key": str, "source": str, "target": str, "start": float, "audio_channel": int, "duration": float}
_TYPES |= {"sample_rate": int, "sha256": str}
_REQUIRED = ("key", "source", "target")
_RULES = {
    "start": "a number of seconds, 0 or more",
    "audio_channel": "a whole number, 0 or more",
    "duration": "a number of seconds above 0",
    "sample_rate": "a whole number of Hz above 0",
}

Location = Callable[[], str]
"""Returns the file and line as text for a message. It is a function, so that only bad lines are formatted."""


def _location(path: PathOrUri, number: int) -> Location:
    return lambda: f"{path}, line {number}"


def _utterance(line: bytes, folder: str, where: Location) -> Utterance:
    values = _checked_fields(line, where)
    values["source"] = resolve(values["source"], folder)
    return _from_fields(values)


def _from_fields(values: dict[str, Any]) -> Utterance:
    known = {name: values.pop(name) for name in _TYPES if name in values}
    return Utterance(**known, extra=values)


def _checked_fields(line: bytes, where: Location) -> dict[str, Any]:
    """Parse a line and check the fields that this project knows; return all fields."""
    try:
        # utf-8-sig removes the byte order mark with which some programs begin a file.
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where()} is not JSON ({error}): each line must be one JSON object.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{where()} is of type {type(values).__name__}: it must be an object with key, source and target."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise InputError(
            f"{where()} has no {' and no '.join(missing)}: each line needs key, source and target."
        )
    for name, kind in _TYPES.items():
        value = values.get(name)
        if value is not None or name in _REQUIRED:
            check = _check_text if kind is str else _check_number
            check(name, value, where)
    if values.get("start") is not None and values.get("duration") is None:
        raise InputError(f"{where()} has a start but no duration: a segment of a file needs both.")
    return values


def _check_text(name: str, value: Any, where: Location) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where()}: {name} must be text, not {json.dumps(value)[:60]}.")
    if not value.strip() and name != "target":
        raise InputError(f"{where()}: {name} must be text that is not blank.")
    if name in ("key", "target"):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where()}: {name} contains half a character (a lone surrogate): write it as UTF-8."
            ) from None


def _check_number(name: str, value: Any, where: Location) -> None:
    kinds = int if _TYPES[name] is int else (int, float)
    # JSON's true and false are ints in Python, so they must be excluded.
    valid = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < math.inf
    if not valid or (value == 0 and name not in ("start", "audio_channel")):
        raise InputError(f"{where()}: {name} must be {_RULES[name]}, not {json.dumps(value)[:60]}.")
