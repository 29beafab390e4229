"""File listings and paths for corpus readers, the same for local folders and for object storage."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from slam_asr.corpora import NO_AUDIO, Candidate, Rejection, Stamp
from slam_asr.errors import InputError, UserError
from slam_asr.storage import Info, info, is_s3, join, local_path, name_of, parent_of, resolve, walk
from slam_asr.storage.paths import folders_in, names_in


class Unpacked:
    """Base class of readers whose corpora need no unpacking."""

    def prepare(self, folder: Path, subsets: list[str]) -> None:
        """Do nothing."""


def absolute(path: str | os.PathLike) -> str:
    """The absolute path, or the URI without a trailing slash."""
    return os.fspath(path).rstrip("/") if is_s3(path) else os.path.abspath(local_path(path))


def is_folder(path: str) -> bool:
    """Whether a local folder exists, or a prefix with at least one object."""
    return any(True for _ in walk(path)) if is_s3(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    """Whether a file or object exists."""
    return info(path) is not None


def files_in(folder: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Sorted paths of the files directly in a folder that have one of these suffixes and are not hidden."""
    return [
        join(folder, n) for n in names_in(folder) if n.lower().endswith(suffixes) and not n.startswith(".")
    ]


def visible_folders(folder: str) -> list[str]:
    """Sorted names of the folders directly in a folder that are not hidden."""
    return [name for name in folders_in(folder) if not name.startswith(".")]


def visible_files(folder: str) -> Iterator[Info]:
    """Yield all files at any depth below a folder, except hidden files and those in hidden folders.

    Other programs create hidden files: macOS leaves a `._x.flac` next to each x.flac.
    """
    return (f for f in walk(folder) if not f.name.startswith(".") and "/." not in f.name)


def readable(name: str) -> str:
    """A file's name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stem_of(path: str) -> str:
    """The name without its suffix: `/data/train.tsv` → `train`. A compression suffix is removed as well."""
    stem, suffix = os.path.splitext(name_of(path))
    return os.path.splitext(stem)[0] if suffix in (".gz", ".bz2", ".xz") else stem


def audio_path(source: str, list_file: str, audio_root: str) -> str:
    """The absolute path or URI of an audio file that a list names.

    Args:
        source: the path or URI in the list; `file://` is removed.
        list_file: path of the list. Relative paths are resolved against its folder.
        audio_root: the recipe's `data.audio_root`. Unless empty, it takes the place of that folder.

    Raises:
        InputError: `source` is a URI with a scheme other than s3:// or file://.
    """
    folder = parent_of(list_file)
    resolved = resolve(source, resolve(audio_root, folder) if audio_root else folder)
    if is_s3(resolved):
        return resolved
    try:
        return os.path.abspath(local_path(resolved))
    except UserError as error:
        raise InputError(f"{list_file}: {error}") from error


def if_present(candidate: Candidate) -> Candidate | Rejection:
    """Return the candidate, or a rejection if its local file is missing. Objects are not checked."""
    if candidate.content is not None or is_s3(candidate.source) or os.path.isfile(candidate.source):
        return candidate
    return Rejection(candidate.key, candidate.source, NO_AUDIO, f"There is no audio file {candidate.source}.")


def stamps_of(lists: Iterable[str], sources: Iterable[str], root: str) -> Iterator[Stamp]:
    """Yield the stamps of files that list utterances, and of the audio files that those name.

    Local audio files are examined one by one. If the corpus is in object storage, all objects below its
    folder are listed instead, which takes far fewer requests; objects elsewhere contribute only their names.

    Args:
        lists: files that list utterances.
        sources: paths and URIs of audio files.
        root: the corpus's path or URI.
    """
    for path in lists:
        if status := info(path):
            yield name_of(path), status.bytes, status.stamp
    if is_s3(root):
        for file in walk(root if is_folder(root) else parent_of(root)):
            yield file.name, file.bytes, file.stamp
    previous = ""
    for source in sources:
        # Segments of one file usually follow each other.
        if source == previous:
            continue
        previous = source
        try:
            local = os.stat(source) if not is_s3(source) else None
        except OSError:
            # A missing file has no stamp, so the stamps change when it appears.
            continue
        yield (source, local.st_size, str(local.st_mtime_ns)) if local else (source, 0, "")
