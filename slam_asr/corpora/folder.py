"""Reader for a folder of audio files with a text file next to each: a/b.txt is the transcript of a/b.flac.

A subset is named after the top-level subfolder of its files, or after the corpus folder if they are directly
in it. An utterance's key is the path of its files relative to the corpus folder, without the suffix.

TIMIT (Garofolo et al., 1993) has this layout too. Its transcripts begin with the numbers of the first and the
last sample: `0 46797 She had …`. These numbers are removed.
"""

import os
import re
from collections.abc import Iterator
from itertools import groupby, islice

import soundfile

from slam_asr.config.recipe import Data
from slam_asr.corpora import AUDIO_SUFFIXES, Candidate, CorpusReader, Item, Reason, Rejection, Stamp
from slam_asr.corpora.places import files_in, is_folder, read_text, readable, visible_files, visible_folders
from slam_asr.errors import InputError
from slam_asr.runtime.external_sort import ExternalSort
from slam_asr.storage import exists, fetch, join, name_of

_TEXT = ".txt"
_SAMPLE_NUMBERS = re.compile(r"\s*0\s+(\d{3,12})\s+(?=\S)")
"""Matches the sample numbers at the beginning of a TIMIT transcript."""
_MAX_CHECKED = 200
"""How many of the first audio files are checked for a text file. If none of them has one, the folder is
regarded as another kind of corpus."""
_TEXTS_CHECKED = 10
"""Number of transcripts that are read to recognise TIMIT's form."""


class Folder(CorpusReader):
    """The reader of a folder of audio and text files."""

    kind = "folder of audio and text"
    layout = "audio files with a .txt file next to each"

    def __init__(self, root: str) -> None:
        self.root = root
        self.has_sample_numbers = False
        """Whether the transcripts begin with the numbers of the first and last sample, as in TIMIT."""
        self.by_subset: dict[str, list[str]] = {}
        """The folders of each subset, relative to the root with a slash at the end; empty for the root."""
        if files_in(root, AUDIO_SUFFIXES):
            self.by_subset[name_of(root)] = [""]
        for name in visible_folders(root):
            if any(f.name.lower().endswith(AUDIO_SUFFIXES) for f in visible_files(join(root, name))):
                self.by_subset.setdefault(name, []).append(f"{name}/")

    @classmethod
    def find(cls, root: str, data: Data) -> "Folder | None":
        """Open a folder; return None if none of its first audio files has a text file."""
        if not is_folder(root):
            return None
        # Generators, so that listing and look-ups end as soon as enough transcripts have been found.
        audio = (f.name for f in visible_files(root) if f.name.lower().endswith(AUDIO_SUFFIXES))
        stems = (join(root, os.path.splitext(name)[0]) for name in islice(audio, _MAX_CHECKED))
        texts = (
            stem + suffix for stem in stems for suffix in (_TEXT, _TEXT.upper()) if exists(stem + suffix)
        )
        if not (first := next(texts, None)):
            return None
        corpus = cls(root)
        corpus.has_sample_numbers = all(
            _SAMPLE_NUMBERS.match(read_text(text)) for text in (first, *islice(texts, _TEXTS_CHECKED - 1))
        )
        return corpus

    def read(self, subset: str) -> Iterator[Item]:
        with ExternalSort() as files:
            # An utterance's files need not be adjacent in the listing: `a.flac`, `a.m.flac`, `a.txt`.
            for name, _, _ in self.stamps(subset):
                stem, suffix = os.path.splitext(name)
                files.add(os.fsencode(stem), suffix.encode())
            for stem, group in groupby(files, key=lambda record: record[0]):
                yield self._utterance(os.fsdecode(stem), [suffix.decode() for _, suffix in group], subset)

    def _utterance(self, stem: str, suffixes: list[str], subset: str) -> Item:
        """Return the utterance whose files have this stem (relative to the root) and these suffixes."""
        key, path = readable(stem), join(self.root, stem)
        audio = next((s for preferred in AUDIO_SUFFIXES for s in suffixes if s.lower() == preferred), None)
        text = next((s for s in suffixes if s.lower() == _TEXT), None)
        if audio is None:
            return Rejection(key, "", Reason.NO_AUDIO, f"{path}{text} has no audio file next to it.")
        if text is None:
            detail = f"{path}{audio} has no {_TEXT} file next to it."
            return Rejection(key, path + audio, Reason.NO_TRANSCRIPT, detail)
        transcript = read_text(path + text)
        if self.has_sample_numbers:
            transcript = _without_sample_numbers(transcript, path + audio, path + text)
        return Candidate(key, path + audio, transcript, {"subset": subset})

    def stamps(self, subset: str) -> Iterator[Stamp]:
        """Yield the stamps of a subset's audio and text files, with names relative to the root."""
        for prefix in self.by_subset[subset]:
            for file in visible_files(join(self.root, prefix) if prefix else self.root):
                # The root lists files at any depth, but those in its subfolders belong to other subsets.
                if file.name.lower().endswith((_TEXT, *AUDIO_SUFFIXES)) and (prefix or "/" not in file.name):
                    yield prefix + file.name, file.bytes, file.stamp


def _without_sample_numbers(transcript: str, audio: str, text: str) -> str:
    """Remove the numbers of the first and last sample from the beginning of a transcript.

    Raises:
        InputError: the numbers do not fit the audio, so they may be words.
    """
    numbers = _SAMPLE_NUMBERS.match(transcript)
    if not numbers:
        return transcript
    try:
        samples = soundfile.info(os.fsencode(fetch(audio))).frames
    except soundfile.LibsndfileError:
        # The file is damaged, and the check of the audio rejects it; or only PyAV reads it, as for .m4a.
        return transcript
    if int(numbers[1]) != samples:
        raise InputError(
            f"{text} begins with `{numbers[0].strip()}`, like TIMIT's transcripts with their first and last "
            f"sample, but its audio has {samples} samples: remove such numbers from the transcripts, or "
            "write them as words if they were spoken."
        )
    return transcript[numbers.end() :]
