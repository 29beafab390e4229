"""File listings and paths for corpus readers, for local folders and for object storage alike."""

import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import groupby

from slam_asr.corpora import Candidate, CorpusReader, Item, Reason, Rejection, Stamp
from slam_asr.errors import InputError, UserError
from slam_asr.storage import Info, info, is_s3, join, local_path, name_of, parent_of, read_bytes, resolve
from slam_asr.storage.paths import folders_in, names_in, walk

IN_ARCHIVE = re.compile(r"\.ark:\d+(\[[^\]]*\])?$")
"""Matches the end of a place in a Kaldi archive, such as wav.ark:17."""
WRITE_TO_FILES = (
    "write each recording to a file, for example with `while read -r id entry; do "
    'wav-copy "$entry" "wav/$id.wav" < /dev/null; done < wav.scp`, and name those files instead'
)
"""Advice for audio that has no file of its own. Kaldi's wav-copy reads commands and places in archives."""


def absolute(path: str | os.PathLike) -> str:
    """Return an absolute path, or a URI without a trailing slash."""
    return os.fspath(path).rstrip("/") if is_s3(path) else os.path.abspath(local_path(path))


def is_folder(path: str) -> bool:
    """Return whether a path is an existing local folder, or a prefix with at least one object."""
    return any(True for _ in walk(path)) if is_s3(path) else os.path.isdir(path)


def files_in(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted paths of the files directly in a folder with one of the suffixes, without hidden
    files."""
    names = [name for name in names_in(folder) if not name.startswith(".")]
    return [join(folder, name) for name in names if name.lower().endswith(suffixes)]


def files_at(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the file at a path, if it has one of the suffixes, or else all such files in the folder."""
    return [path] if path.lower().endswith(suffixes) and info(path) else files_in(path, suffixes)


def visible_folders(folder: str) -> list[str]:
    """Return the sorted names of the folders directly in a folder, without hidden ones."""
    return [name for name in folders_in(folder) if not name.startswith(".")]


def visible_files(folder: str) -> Iterator[Info]:
    """Yield all files at any depth below a folder, except hidden files and those in hidden folders.

    Other programs create hidden files: macOS leaves a `._x.flac` next to each x.flac.
    """
    return (f for f in walk(folder) if not f.name.startswith(".") and "/." not in f.name)


def readable(name: str) -> str:
    """Return a file's name as text, in which bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stem_of(path: str) -> str:
    """Return a file's name without suffixes: `/data/train.tsv` → `train`, `train.jsonl.gz` → `train`."""
    stem, suffix = os.path.splitext(name_of(path))
    return os.path.splitext(stem)[0] if suffix in (".gz", ".bz2", ".xz") else stem


def read_text(file: str) -> str:
    """Read the content of a text file.

    Raises:
        InputError: the file is not UTF-8.
    """
    try:
        # `-sig` removes the byte order mark of Windows programs, which would become part of the first word.
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8."
        ) from error


def audio_path(source: str, list_file: str, audio_root: str) -> str:
    """Return the absolute path or URI of an audio file that a list names.

    Args:
        source: the path or URI in the list; a file URI becomes its path.
        list_file: path of the list. Relative paths are resolved against its folder.
        audio_root: the recipe's `data.audio_root`; if not empty, it is used instead of that folder.

    Raises:
        InputError: `source` is a URI with a scheme other than s3:// or file://, or is in a Kaldi archive.
    """
    if IN_ARCHIVE.search(source):
        raise InputError(f"{list_file}: {source[:80]} is in a Kaldi archive: {WRITE_TO_FILES}.")
    folder = parent_of(list_file)
    resolved = resolve(source, resolve(audio_root, folder) if audio_root else folder)
    try:
        return resolved if is_s3(resolved) else absolute(resolved)
    except UserError as error:
        raise InputError(f"{list_file}: {error}") from error


class ListedCorpus(CorpusReader):
    """Base class of readers of lists, whose audio files may be anywhere."""

    def lists(self, subset: str) -> Iterable[str]:
        """Return the paths of the lists with a subset's utterances."""
        return self.by_subset[subset]

    @abstractmethod
    def items(self, subset: str) -> Iterator[Item]:
        """Yield a subset's utterances as the lists give them, whether or not their audio files exist."""

    def sources(self, subset: str) -> Iterator[str]:
        """Yield the paths and URIs of the audio files that a subset's stamps include."""
        return (item.source for item in self.items(subset) if isinstance(item, Candidate))

    def stamps(self, subset: str) -> Iterator[Stamp]:
        """Yield the stamps of a subset's lists, and of the audio files that they name.

        Local audio files are examined one by one. If the corpus is in object storage, all objects below its
        folder are listed instead, which takes far fewer requests. For objects elsewhere, only the names are
        used.
        """
        for path in self.lists(subset):
            if status := info(path):
                yield name_of(path), status.bytes, status.stamp
        if is_s3(self.root):
            for file in walk(self.root if is_folder(self.root) else parent_of(self.root)):
                yield file.name, file.bytes, file.stamp
        # Segments of one file usually follow each other.
        for source, _ in groupby(self.sources(subset)):
            try:
                local = os.stat(source) if not is_s3(source) else None
            except (OSError, ValueError):
                # A missing file has no stamp, so the stamps change when it appears. A name with a zero byte
                # raises a ValueError.
                continue
            yield (source, local.st_size, str(local.st_mtime_ns)) if local else (source, 0, "")

    def read(self, subset: str) -> Iterator[Item]:
        return map(_if_present, self.items(subset))


def _if_present(item: Item) -> Item:
    """Return the utterance, or a rejection if its local file is missing. Objects are not checked."""
    source = item.source
    if isinstance(item, Rejection) or item.content is not None or is_s3(source) or os.path.isfile(source):
        return item
    return Rejection(item.key, source, Reason.NO_AUDIO, f"There is no audio file {source}.")
