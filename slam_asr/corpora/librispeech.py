"""Reader for a LibriSpeech tree, as unpacked from the archives (Panayotov et al., 2015; openslr.org/12).

LibriSpeech/                      may be missing, or be the corpus folder itself
    train-clean-100/              a subset; may be the corpus folder itself
        19/198/                   speaker and chapter
            19-198.trans.txt      `19-198-0000 NORTHANGER ABBEY`, one utterance per line
            19-198-0000.flac      or another audio file
"""

import os
from collections.abc import Iterator
from itertools import groupby, islice

from slam_asr.artifacts.writing_systems import comparable
from slam_asr.config.recipe import Data
from slam_asr.corpora import AUDIO_SUFFIXES, Candidate, CorpusReader, Item, Reason, Rejection, Stamp
from slam_asr.corpora.places import is_folder, read_text, visible_files, visible_folders
from slam_asr.storage import Info, join, name_of

TRANSCRIPTS = ".trans.txt"
TREE_SUFFIXES = (TRANSCRIPTS, *AUDIO_SUFFIXES)
"""Suffixes of the files of a tree."""
OUTER = "LibriSpeech"
_MAX_CHECKED = 5000
"""Maximum number of files, about a hundred chapters, that are checked to recognise a subset's folder."""


class LibriSpeech(CorpusReader):
    """The reader of a LibriSpeech tree.

    Args:
        root: the corpus folder or URI.
        by_subset: the folder of each subset, keyed by the subset's name.
    """

    kind = "LibriSpeech tree"
    layout = "<subset>/<speaker>/<chapter>/ with .trans.txt and audio files"

    def __init__(self, root: str, by_subset: dict[str, str]) -> None:
        self.root, self.by_subset = root, by_subset

    @classmethod
    def find(cls, root: str, data: Data) -> "LibriSpeech | None":
        """Open the tree in a folder; return None if the folder has another layout."""
        if not is_folder(root):
            return None
        bases = (root, join(root, OUTER))
        trees = [{name: join(base, name) for name in visible_folders(base)} for base in bases]
        for tree in (*trees, {name_of(root): root}):
            folders = {name: folder for name, folder in tree.items() if _has_files(folder, TREE_SUFFIXES)}
            # One subset with transcripts identifies the layout. Subsets with only audio are included too, so
            # that `read` reports the missing transcripts.
            if any(_has_files(folder, (TRANSCRIPTS,)) for folder in folders.values()):
                return cls(root, folders)
        return None

    def stamps(self, subset: str) -> Iterator[Stamp]:
        for _, _, files in self._chapters(subset):
            for file in files:
                yield f"{subset}/{file.name}", file.bytes, file.stamp

    def read(self, subset: str) -> Iterator[Item]:
        for speaker, chapter, files in self._chapters(subset):
            audio = self._preferred_audio(subset, files)
            with_transcript = set()
            for file in (f for f in files if f.name.lower().endswith(TRANSCRIPTS)):
                path = join(self.by_subset[subset], file.name)
                for number, key, text in _transcripts(path):
                    source = audio.get(key, "")
                    if key in with_transcript:
                        detail = f"{path}, line {number}: {key} already has a line."
                        yield Rejection(key, source, Reason.DUPLICATE, detail)
                    elif not source:
                        detail = f"{path}, line {number}: no audio file {key} next to it."
                        yield Rejection(key, source, Reason.NO_AUDIO, detail)
                    else:
                        yield Candidate(
                            key, source, text, {"subset": subset, "speaker": speaker, "chapter": chapter}
                        )
                    with_transcript.add(key)
            for key in sorted(audio.keys() - with_transcript):
                detail = f"{audio[key]} has no line in a {TRANSCRIPTS} file next to it."
                yield Rejection(key, audio[key], Reason.NO_TRANSCRIPT, detail)

    def _chapters(self, subset: str) -> Iterator[tuple[str, str, list[Info]]]:
        """Yield each chapter as (speaker, chapter, its transcript and audio files), all sorted by name."""
        files = _chapter_files(self.by_subset[subset])
        relevant = (f for f in files if f.name.lower().endswith(TREE_SUFFIXES))
        # `walk` lists files sorted by name, so all files of a chapter are adjacent.
        for folder, group in groupby(relevant, key=lambda f: f.name.rpartition("/")[0]):
            speaker, chapter = folder.split("/")
            yield speaker, chapter, list(group)

    def _preferred_audio(self, subset: str, files: list[Info]) -> dict[str, str]:
        """Return the audio file of each key. If a key has several, the preferred suffix decides."""
        audio = [os.path.splitext(f.name) for f in files if f.name.lower().endswith(AUDIO_SUFFIXES)]
        # The preferred file of a key comes last, and replaces the others.
        audio.sort(key=lambda parts: (AUDIO_SUFFIXES.index(parts[1].lower()), parts), reverse=True)
        folder = self.by_subset[subset]
        # macOS writes names of files in another Unicode form.
        return {comparable(name_of(stem)): join(folder, stem + suffix) for stem, suffix in audio}


def _chapter_files(subset: str) -> Iterator[Info]:
    """Return the files of all chapters, which are exactly two folders below the subset."""
    return (f for f in visible_files(subset) if f.name.count("/") == 2)


def _has_files(subset: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether one of the first chapters has a file with one of the suffixes."""
    return any(f.name.lower().endswith(suffixes) for f in islice(_chapter_files(subset), _MAX_CHECKED))


def _transcripts(file: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number (from 1), key and text of each utterance; the text may be empty."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if words := line.split(maxsplit=1):
            yield number, comparable(words[0]), " ".join(words[1:])
