"""A LibriSpeech tree, as it comes out of the archives (Panayotov et al., 2015; openslr.org/12).

LibriSpeech/                                  (may be left out, or be the folder given)
    train-clean-100/                          subset (may be the folder given)
        19/198/                               speaker, chapter
            19-198.trans.txt                  `19-198-0000 NORTHANGER ABBEY`, a line an utterance
            19-198-0000.flac                  or wav, ogg, opus, mp3
"""

import os
from collections.abc import Iterator
from itertools import groupby, islice

from slam_asr.corpora import AUDIO_SUFFIXES, DUPLICATE, NO_AUDIO, NO_TRANSCRIPT, Candidate, Rejection, Stamp
from slam_asr.corpora.places import Unpacked, is_folder, name_of, visible_files, visible_folders
from slam_asr.errors import UserError
from slam_asr.recipe import Data
from slam_asr.storage import Info, join, read_bytes

TRANSCRIPTS = ".trans.txt"
OUTER = "LibriSpeech"
LAYOUT = "<subset>/<speaker>/<chapter>/ with .trans.txt and audio files"
_LOOKED_AT = 5000
"""Files of a folder that are looked at to tell whether it is a subset: those of a hundred chapters."""


class LibriSpeech(Unpacked):
    """The reader of one tree."""

    kind = "LibriSpeech tree"

    def __init__(self, root: str | os.PathLike, folders: dict[str, str]) -> None:
        self.root = os.fspath(root)
        self.folders = folders

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "LibriSpeech | None":
        """The tree in a folder, or None where the folder is laid out in another way."""
        root = os.fspath(root)
        if not is_folder(root):
            return None
        trees = [
            {name: join(base, name) for name in visible_folders(base)} for base in (root, join(root, OUTER))
        ]
        for tree in (*trees, {name_of(root): root}):
            folders = {
                name: folder
                for name, folder in tree.items()
                if _holds(folder, (TRANSCRIPTS, *AUDIO_SUFFIXES))
            }
            if any(_holds(folder, (TRANSCRIPTS,)) for folder in folders.values()):
                return cls(root, folders)
        return None

    def subsets(self) -> list[str]:
        return sorted(self.folders)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        for _, _, files in self._chapters(subset):
            for file in files:
                yield f"{subset}/{file.name}", file.bytes, file.stamp

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        for speaker, chapter, files in self._chapters(subset):
            audio = self._preferred_audio(subset, files)
            spoken = set()
            for file in (f for f in files if f.name.lower().endswith(TRANSCRIPTS)):
                path = join(self.folders[subset], file.name)
                for number, key, text in _transcripts(path):
                    source = audio.get(key, "")
                    if key in spoken:
                        detail = f"{path}, line {number}: {key} has a line already."
                        yield Rejection(key, source, DUPLICATE, detail)
                    elif not source:
                        detail = f"{path}, line {number}: no audio file {key} beside it."
                        yield Rejection(key, source, NO_AUDIO, detail)
                    else:
                        yield Candidate(
                            key, source, text, {"subset": subset, "speaker": speaker, "chapter": chapter}
                        )
                    spoken.add(key)
            for key in sorted(audio.keys() - spoken):
                detail = f"{audio[key]} has no line in a {TRANSCRIPTS} file beside it."
                yield Rejection(key, audio[key], NO_TRANSCRIPT, detail)

    def _chapters(self, subset: str) -> Iterator[tuple[str, str, list[Info]]]:
        """Speaker, chapter and the files that matter, everything in order of name."""
        matter = (
            f
            for f in _of_chapters(self.folders[subset])
            if f.name.lower().endswith((TRANSCRIPTS, *AUDIO_SUFFIXES))
        )
        for folder, files in groupby(matter, key=lambda f: f.name.rpartition("/")[0]):
            yield *folder.split("/"), list(files)

    def _preferred_audio(self, subset: str, files: list[Info]) -> dict[str, str]:
        """Audio files by key."""
        found: dict[str, tuple[int, str]] = {}
        for file in files:
            key, suffix = os.path.splitext(name_of(file.name))
            if suffix.lower() in AUDIO_SUFFIXES:
                choice = AUDIO_SUFFIXES.index(suffix.lower()), join(self.folders[subset], file.name)
                found[key] = min(found.get(key, choice), choice)
        return {key: path for key, (_, path) in found.items()}


def _of_chapters(subset: str) -> Iterator[Info]:
    """The files that lie where a chapter's do, two levels below."""
    return (f for f in visible_files(subset) if f.name.count("/") == 2)


def _holds(subset: str, suffixes: tuple[str, ...]) -> bool:
    return any(f.name.lower().endswith(suffixes) for f in islice(_of_chapters(subset), _LOOKED_AT))


def _transcripts(file: str) -> Iterator[tuple[int, str, str]]:
    """Line number, key and text of each line; the text may be blank."""
    try:
        lines = read_bytes(file).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): write it anew as UTF-8."
        ) from error
    for number, line in enumerate(lines, start=1):
        if words := line.split(maxsplit=1):
            yield number, words[0], " ".join(words[1:])
