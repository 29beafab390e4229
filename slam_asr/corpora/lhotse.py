"""Lhotse's cuts: JSON lines (.jsonl or .jsonl.gz), a MonoCut each.

A cut with one supervision is an utterance; one with several is an utterance for each. A file's
subset is what stands behind `cuts_` in its name: librispeech_cuts_train-clean-100.jsonl.gz is
train-clean-100. What is not one channel of one recording is set aside: mixed cuts, cuts of many
channels, recordings that Lhotse changes as it loads them.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from slam_asr.corpora import NO_AUDIO, NO_TRANSCRIPT, UNSUPPORTED, Candidate, Rejection, Stamp
from slam_asr.corpora.places import Unpacked, audio_path, files_in, if_present, is_file, stamps_of, stem_of
from slam_asr.errors import UserError
from slam_asr.recipe import Data
from slam_asr.storage import open_stream

SUFFIXES = (".jsonl", ".jsonl.gz")
LAYOUT = ".jsonl or .jsonl.gz files of cuts"
_KINDS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
_WHOLE = 1e-3
"""Seconds by which a cut may differ from its recording and still be all of it."""


class Lhotse(Unpacked):
    """The reader of one file of cuts, or of a folder of them."""

    kind = "Lhotse cuts"

    def __init__(self, root: str, files: list[str], data: Data) -> None:
        self.root, self.data = root, data
        self.files: dict[str, list[str]] = {}
        for file in files:
            self.files.setdefault(_subset(file), []).append(file)

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Lhotse | None":
        """The cuts at a path, or None where no file begins with one."""
        root = os.fspath(root)
        one = root.lower().endswith(SUFFIXES) and is_file(root)
        files = [file for file in ([root] if one else files_in(root, SUFFIXES)) if _begins_with_a_cut(file)]
        return cls(root, files, data or Data()) if files else None

    def subsets(self) -> list[str]:
        return sorted(self.files)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        sources = (item.source for item in self._items(subset) if isinstance(item, Candidate))
        return stamps_of(self.files[subset], sources, self.root)

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        return (if_present(item) if isinstance(item, Candidate) else item for item in self._items(subset))

    def _items(self, subset: str) -> Iterator[Candidate | Rejection]:
        for file in self.files[subset]:
            for number, cut in _cuts(file):
                try:
                    yield from self._utterances(cut, subset, file)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    raise UserError(
                        f"{file}, line {number} is not a cut as Lhotse writes them ({type(error).__name__}: {error}): export the cuts again."
                    ) from error

    def _utterances(self, cut: dict[str, Any], subset: str, file: str) -> Iterator[Candidate | Rejection]:
        if why := _why_not(cut):
            yield Rejection(str(cut["id"]), "", UNSUPPORTED, f"The cut {cut['id']} {why}.")
            return
        recording = cut.get("recording")
        if not recording or not recording["sources"]:
            yield Rejection(str(cut["id"]), "", NO_AUDIO, f"The cut {cut['id']} has no recording.")
            return
        source = audio_path(recording["sources"][0]["source"], file, self.data.audio_root)
        supervisions = cut.get("supervisions") or []
        if not supervisions:
            yield Rejection(str(cut["id"]), source, NO_TRANSCRIPT, f"The cut {cut['id']} has no supervision.")
        for supervision in supervisions:
            one = len(supervisions) == 1
            key = str(cut["id"] if one else supervision["id"])
            start = float(cut["start"]) + (0.0 if one else float(supervision["start"]))
            duration = float(cut["duration"] if one else supervision["duration"])
            # A supervision may begin a little before its cut.
            start, duration = max(start, 0.0), duration + min(start, 0.0)
            whole = start < _WHOLE and abs(duration - float(recording["duration"])) < _WHOLE
            extra = {"subset": subset} | {
                n: supervision[n] for n in ("speaker", "language", "gender") if supervision.get(n)
            }
            yield Candidate(
                key,
                source,
                supervision.get("text") or "",
                extra,
                *((None, None) if whole else (round(start, 6), round(duration, 6))),
            )


def _why_not(cut: dict[str, Any]) -> str:
    """What makes a cut other than a stretch of one channel of one file, or nothing."""
    if cut.get("type", "MonoCut") != "MonoCut":
        return f"is a {cut['type']}"
    recording = cut.get("recording") or {}
    sources = recording.get("sources") or []
    if len(sources) > 1 or any(len(s.get("channels") or [0]) > 1 for s in sources):
        return "is one channel of a recording with several"
    if recording.get("transforms"):
        return "has a recording that is to be changed when it is loaded"
    if sources and sources[0].get("type") not in ("file", "url"):
        return f"has its audio from a {sources[0].get('type')}, which is not read"
    return ""


def _subset(file: str) -> str:
    stem = stem_of(file)
    return re.split(r"(?:^|[_-])cuts[_-]", stem, maxsplit=1)[-1] or stem


def _begins_with_a_cut(file: str) -> bool:
    first = next(_cuts(file, strict=False), (0, None))[1]
    return isinstance(first, dict) and (
        first.get("type") in _KINDS or {"recording", "supervisions", "start"} <= first.keys()
    )


def _cuts(file: str, strict: bool = True) -> Iterator[tuple[int, Any]]:
    """Line numbers and cuts of a file; without `strict`, what is no JSON ends it."""
    number = 0
    try:
        with _lines(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    cut = json.loads(line)
                    if strict and not isinstance(cut, dict):
                        raise UserError(
                            f"{file}, line {number} holds {type(cut).__name__} where a cut must stand."
                        )
                    yield number, cut
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if strict:
            raise UserError(
                f"{file}, line {number} cannot be read as JSON ({error}): was it copied whole?"
            ) from error


def _lines(file: str) -> BinaryIO:
    stream = open_stream(file)
    return io.BufferedReader(gzip.GzipFile(fileobj=stream)) if file.lower().endswith(".gz") else stream
