"""Reader for Lhotse cuts: JSON lines (.jsonl or .jsonl.gz) with one MonoCut per line.

A cut with one supervision is an utterance. A cut with several supervisions gives one utterance for each. The
subset is the part of the file's name after `cuts_`: librispeech_cuts_train-clean-100.jsonl.gz holds the
subset train-clean-100. Without `cuts_`, it is the file's name without suffixes. Some cuts are rejected: cuts
without a recording or without a supervision, mixed cuts, cuts of several channels, padding, and cuts of a
recording that has several channels or files, a transform other than Resample, or audio that is neither a file
nor a URL.
"""

import re
from collections.abc import Iterator
from typing import Any

from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate, Item, Reason, Rejection
from slam_asr.corpora.places import ListedCorpus, audio_path, files_at, stem_of
from slam_asr.corpora.rows import json_rows
from slam_asr.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz")
_KINDS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")
_TOLERANCE = 1e-3
"""Seconds. An utterance counts as the complete recording if it starts less than this after the recording's
start and their durations differ by less than this."""


class Lhotse(ListedCorpus):
    """The reader of a file of cuts, or of a folder of such files."""

    kind = "Lhotse cuts"
    layout = ".jsonl or .jsonl.gz files of Lhotse cuts"

    def __init__(self, root: str, files: list[str], data: Data) -> None:
        self.root, self.data = root, data
        self.by_subset: dict[str, list[str]] = {}
        for file in files:
            stem = stem_of(file)
            subset = re.split(r"(?:^|[_-])cuts[_-]", stem, maxsplit=1)[-1] or stem
            self.by_subset.setdefault(subset, []).append(file)

    @classmethod
    def find(cls, root: str, data: Data) -> "Lhotse | None":
        """Open the files of cuts at a path; return None if no file begins with a cut.

        Raises:
            InputError: the files are recordings and supervisions, from which cuts must be made first.
        """
        first_lines = {file: _first_line(file) for file in files_at(root, SUFFIXES)}
        files = [file for file, line in first_lines.items() if _is_cut(line)]
        if not files:
            for file, line in first_lines.items():
                _refuse_parts_of_cuts(file, line)
        return cls(root, files, data) if files else None

    def items(self, subset: str) -> Iterator[Item]:
        for file in self.by_subset[subset]:
            for number, cut in json_rows(file):
                try:
                    yield from self._utterances(cut, subset, file)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    raise InputError(
                        f"{file}, line {number} is not a Lhotse cut ({type(error).__name__}: {error}): "
                        "export the cuts again."
                    ) from error

    def _utterances(self, cut: dict[str, Any], subset: str, file: str) -> Iterator[Item]:
        """Yield an utterance for each supervision of a cut; a rejection if the cut cannot be used."""
        if problem := _unsupported(cut):
            yield Rejection(str(cut["id"]), "", Reason.UNSUPPORTED, f"The cut {cut['id']} {problem}.")
            return
        recording = cut.get("recording")
        if not recording or not recording["sources"]:
            yield Rejection(str(cut["id"]), "", Reason.NO_AUDIO, f"The cut {cut['id']} has no recording.")
            return
        source = audio_path(recording["sources"][0]["source"], file, self.data.audio_root)
        supervisions = cut.get("supervisions") or []
        if not supervisions:
            detail = f"The cut {cut['id']} has no supervision."
            yield Rejection(str(cut["id"]), source, Reason.NO_TRANSCRIPT, detail)
        for supervision in supervisions:
            only = len(supervisions) == 1
            key = str(cut["id"] if only else supervision["id"])
            # A supervision's start is relative to its cut, in seconds.
            start = float(cut["start"]) + (0.0 if only else float(supervision["start"]))
            duration = float(cut["duration"] if only else supervision["duration"])
            # A supervision may begin slightly before its cut, and thus before the recording. The duration is
            # then reduced by the part before the recording.
            start, duration = max(start, 0.0), duration + min(start, 0.0)
            text = supervision.get("text") or ""
            if not isinstance(text, str):
                raise TypeError(f"its text is of type {type(text).__name__}")
            # An utterance that is a complete file gets neither start nor duration. Its audio id is then that
            # of the file, as in manifests of other corpora.
            complete = start < _TOLERANCE and abs(duration - float(recording["duration"])) < _TOLERANCE
            extra = {"subset": subset} | {
                n: supervision[n] for n in ("speaker", "language", "gender") if supervision.get(n)
            }
            span = (None, None) if complete else (round(start, 6), round(duration, 6))
            yield Candidate(key, source, text, extra, *span)


def _unsupported(cut: dict[str, Any]) -> str:
    """Return why a cut is of an unsupported form; empty if it is a segment of one file with one channel, or
    has no recording."""
    if cut.get("type", "MonoCut") != "MonoCut":
        return f"is a {cut['type']}"
    recording = cut.get("recording") or {}
    sources = recording.get("sources") or []
    if len(sources) > 1 or any(len(s.get("channels") or [0]) > 1 for s in sources):
        return "is one channel of a recording with several"
    # Every recording is resampled to 16 kHz when it is read, so Resample changes nothing.
    if any(transform.get("name") != "Resample" for transform in recording.get("transforms") or []):
        return "has a recording with transforms, which are not applied here"
    if sources and sources[0].get("type") not in ("file", "url"):
        return f"has audio of type {sources[0].get('type')}, which is not supported"
    return ""


def _first_line(file: str) -> dict[str, Any]:
    """Return the first line of a file; empty if it is not a JSON object."""
    try:
        return next(json_rows(file), (0, {}))[1]
    except InputError:
        return {}


def _is_cut(line: dict[str, Any]) -> bool:
    return line.get("type") in _KINDS or {"recording", "supervisions", "start"} <= line.keys()


def _refuse_parts_of_cuts(file: str, line: dict[str, Any]) -> None:
    """Raise if a file has recordings or supervisions, which `lhotse prepare` writes before cuts are made."""
    is_recording = {"id", "sources", "sampling_rate"} <= line.keys()
    if is_recording or ({"id", "recording_id", "start", "duration"} <= line.keys() and "source" not in line):
        raise InputError(
            f"{file} has Lhotse's {'recordings' if is_recording else 'supervisions'}, not cuts: make cuts of "
            "each part with `lhotse cut simple -r RECORDINGS -s SUPERVISIONS cuts_PART.jsonl.gz` in a folder "
            "of their own, and give that folder."
        )
