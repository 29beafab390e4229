"""A folder of audio with a text file beside each: a/b.flac is said in a/b.txt.

An utterance's subset is the first folder on its way (or the folder itself, for files right in it),
its key the way to it without the suffix.
"""

import os
from collections.abc import Iterator
from itertools import groupby, islice

from slam_asr.corpora import AUDIO_SUFFIXES, NO_AUDIO, NO_TRANSCRIPT, Candidate, Rejection, Stamp
from slam_asr.corpora.places import (
    Unpacked,
    files_in,
    is_file,
    is_folder,
    readable,
    visible_files,
    visible_folders,
)
from slam_asr.errors import UserError
from slam_asr.external_sort import ExternalSort
from slam_asr.recipe import Data
from slam_asr.storage import join, name_of, read_bytes

LAYOUT = "audio files with a .txt beside each"
_TEXT = ".txt"
_LOOKED_AT = 200
"""Audio files that are looked at for a text beside."""


class Folder(Unpacked):
    """The reader of one folder."""

    kind = "folder of audio and text"

    def __init__(self, root: str) -> None:
        self.root = root
        self._here = name_of(root)
        self._below = [name for name in visible_folders(root) if _holds_audio(join(root, name))]
        self._has_own = bool(files_in(root, AUDIO_SUFFIXES))

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Folder | None":
        """The folder, or None where no audio has a text beside it."""
        root = os.fspath(root)
        if not is_folder(root):
            return None
        audio = (f.name for f in visible_files(root) if f.name.lower().endswith(AUDIO_SUFFIXES))
        if any(is_file(join(root, os.path.splitext(name)[0] + _TEXT)) for name in islice(audio, _LOOKED_AT)):
            return cls(root)
        return None

    def subsets(self) -> list[str]:
        return sorted({*self._below, *([self._here] if self._has_own else [])})

    def stamps(self, subset: str) -> Iterator[Stamp]:
        return ((name, size, stamp) for name, size, stamp in self._files(subset))

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        with ExternalSort() as files:
            # Files of one utterance are not always neighbours by name: `a.flac`, `a.b.flac`, `a.txt`.
            for name, _, _ in self._files(subset):
                stem, suffix = os.path.splitext(name)
                files.add(os.fsencode(stem), suffix.encode())
            for stem, group in groupby(files, key=lambda record: record[0]):
                yield self._utterance(os.fsdecode(stem), [suffix.decode() for _, suffix in group], subset)

    def _utterance(self, stem: str, suffixes: list[str], subset: str) -> Candidate | Rejection:
        key, place = readable(stem), join(self.root, stem)
        audio = min(
            (s for s in suffixes if s.lower() in AUDIO_SUFFIXES),
            key=lambda s: AUDIO_SUFFIXES.index(s.lower()),
            default=None,
        )
        text = next((s for s in suffixes if s.lower() == _TEXT), None)
        if audio is None:
            return Rejection(key, "", NO_AUDIO, f"{place}{text} has no audio file beside it.")
        if text is None:
            return Rejection(
                key, place + audio, NO_TRANSCRIPT, f"{place}{audio} has no {_TEXT} file beside it."
            )
        return Candidate(key, place + audio, _said(place + text), {"subset": subset})

    def _files(self, subset: str) -> Iterator[Stamp]:
        """Audio and text files of a subset, by their names below the root."""
        own = subset == self._here and self._has_own
        below = visible_files(join(self.root, subset)) if subset in self._below else ()
        for prefix, files in (("", visible_files(self.root) if own else ()), (f"{subset}/", below)):
            for file in files:
                if file.name.lower().endswith((_TEXT, *AUDIO_SUFFIXES)) and (prefix or "/" not in file.name):
                    yield prefix + file.name, file.bytes, file.stamp


def _holds_audio(folder: str) -> bool:
    return any(f.name.lower().endswith(AUDIO_SUFFIXES) for f in visible_files(folder))


def _said(file: str) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): write it anew as UTF-8."
        ) from error
