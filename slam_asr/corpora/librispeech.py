"""A LibriSpeech tree, as it comes out of the archives (Panayotov et al., 2015; openslr.org/12).

LibriSpeech/                                  (may be left out, or be the folder given)
    train-clean-100/                          subset (may be the folder given)
        19/198/                               speaker, chapter
            19-198.trans.txt                  `19-198-0000 NORTHANGER ABBEY`, a line an utterance
            19-198-0000.flac                  or wav, ogg, opus, mp3
"""

import os
from collections.abc import Iterator
from pathlib import Path

from slam_asr.corpora import (
    AUDIO_SUFFIXES,
    DUPLICATE,
    NO_AUDIO,
    NO_TRANSCRIPT,
    Candidate,
    Rejection,
    Stamp,
    stamp,
)
from slam_asr.errors import UserError

TRANSCRIPTS = ".trans.txt"
_OUTER = "LibriSpeech"


class LibriSpeech:
    """The reader of one tree."""

    kind = "LibriSpeech tree"

    def __init__(self, root: Path, folders: dict[str, Path]) -> None:
        self.root = root
        self.folders = folders

    @classmethod
    def find(cls, root: Path) -> "LibriSpeech | None":
        """The tree in a folder, or None where the folder is laid out in another way."""
        if not root.is_dir():
            return None
        trees = [{f.name: f for f in _folders(base)} for base in (root, root / _OUTER)]
        for tree in (*trees, {root.name: root}):
            folders = {name: folder for name, folder in tree.items() if _holds(folder, (TRANSCRIPTS, *AUDIO_SUFFIXES))}
            if any(_holds(folder, (TRANSCRIPTS,)) for folder in folders.values()):
                return cls(root, folders)
        return None

    def subsets(self) -> list[str]:
        return sorted(self.folders)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        for _, _, entries in self._chapters(subset):
            for entry in entries:
                yield stamp(os.path.relpath(entry.path, self.root), entry.stat())

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        for speaker, chapter, entries in self._chapters(subset):
            audio = _preferred_audio(entries)
            spoken = set()
            for file in (e for e in entries if e.name.lower().endswith(TRANSCRIPTS)):
                for number, key, text in _transcripts(Path(file.path)):
                    source = audio.get(key, "")
                    if key in spoken:
                        detail = f"{file.path}, line {number}: {key} has a line already."
                        yield Rejection(key, source, DUPLICATE, detail)
                    elif not source:
                        detail = f"{file.path}, line {number}: no audio file {key} beside it."
                        yield Rejection(key, source, NO_AUDIO, detail)
                    else:
                        yield Candidate(key, source, text, {"subset": subset, "speaker": speaker, "chapter": chapter})
                    spoken.add(key)
            for key in sorted(audio.keys() - spoken):
                detail = f"{audio[key]} has no line in a {TRANSCRIPTS} file beside it."
                yield Rejection(key, audio[key], NO_TRANSCRIPT, detail)

    def _chapters(self, subset: str) -> Iterator[tuple[str, str, list[os.DirEntry]]]:
        """Speaker, chapter and the files that matter, everything in order of name."""
        for speaker in _folders(self.folders[subset]):
            for chapter in _folders(speaker):
                yield speaker.name, chapter.name, [e for e in _entries(chapter) if _matters(e)]


def _entries(folder: Path) -> list[os.DirEntry]:
    # Names with a dot in front are other programs' (macOS leaves `._x.flac` beside each x.flac).
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _folders(folder: Path) -> list[Path]:
    return [Path(e.path) for e in _entries(folder) if e.is_dir()] if folder.is_dir() else []


def _matters(entry: os.DirEntry) -> bool:
    return entry.is_file() and entry.name.lower().endswith((TRANSCRIPTS, *AUDIO_SUFFIXES))


def _holds(subset: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether such files lie where a chapter's do, two levels below."""
    chapters = (chapter for speaker in _folders(subset) for chapter in _folders(speaker))
    return any(e.is_file() and e.name.lower().endswith(suffixes) for chapter in chapters for e in _entries(chapter))


def _preferred_audio(entries: list[os.DirEntry]) -> dict[str, str]:
    """Audio files by key."""
    found: dict[str, tuple[int, str]] = {}
    for entry in entries:
        key, suffix = os.path.splitext(entry.name)
        if suffix.lower() in AUDIO_SUFFIXES:
            choice = AUDIO_SUFFIXES.index(suffix.lower()), entry.path
            found[key] = min(found.get(key, choice), choice)
    return {key: path for key, (_, path) in found.items()}


def _transcripts(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, key and text of each line; the text may be blank."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): write it anew as UTF-8."
        ) from error
    for number, line in enumerate(lines, start=1):
        if words := line.split(maxsplit=1):
            yield number, words[0], " ".join(words[1:])
