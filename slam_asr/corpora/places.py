"""What readers ask of a place, whether it is a folder or a prefix in object storage."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from slam_asr.corpora import NO_AUDIO, Candidate, Rejection, Stamp
from slam_asr.errors import UserError
from slam_asr.storage import Info, info, is_s3, join, local_path, name_of, parent_of, resolve, walk
from slam_asr.storage.paths import folders_in, names_in


class Unpacked:
    """What readers of corpora that lie open have in common."""

    def prepare(self, folder: Path, subsets: list[str]) -> None:
        """Nothing is packed."""


def absolute(path: str | os.PathLike) -> str:
    """An absolute path, or the URI as it is."""
    return os.fspath(path).rstrip("/") if is_s3(path) else os.path.abspath(local_path(path))


def is_folder(path: str) -> bool:
    """Whether anything lies below a path."""
    return any(True for _ in walk(path)) if is_s3(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    """Whether there is such a file or object."""
    return info(path) is not None


def files_in(folder: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Full names of the files right in a folder that end so, without hidden ones, in order."""
    return [
        join(folder, n) for n in names_in(folder) if n.lower().endswith(suffixes) and not n.startswith(".")
    ]


def visible_folders(folder: str) -> list[str]:
    """Names of the folders right in a folder, without hidden ones, in order."""
    return [name for name in folders_in(folder) if not name.startswith(".")]


def visible_files(folder: str) -> Iterator[Info]:
    """All files below a folder, but for hidden ones and those in hidden folders.

    Names with a dot in front are other programs' (macOS leaves `._x.flac` beside each x.flac).
    """
    return (f for f in walk(folder) if not f.name.startswith(".") and "/." not in f.name)


def readable(name: str) -> str:
    """A file's name as text; what of it is not UTF-8 is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stem_of(path: str) -> str:
    """`/data/train.tsv` → `train`; `.gz` and the like go too."""
    stem, suffix = os.path.splitext(name_of(path))
    return os.path.splitext(stem)[0] if suffix in (".gz", ".bz2", ".xz") else stem


def audio_path(named: str, listed_in: str, audio_root: str) -> str:
    """The absolute path or URI of audio that a file names; `file://` is taken off.

    Raises:
        UserError: it is neither a path nor an s3:// URI.
    """
    folder = parent_of(listed_in)
    found = resolve(named, resolve(audio_root, folder) if audio_root else folder)
    if is_s3(found):
        return found
    try:
        return os.path.abspath(local_path(found))
    except UserError as error:
        raise UserError(f"{listed_in}: {error}") from error


def if_present(candidate: Candidate) -> Candidate | Rejection:
    """The candidate, or a rejection where its local file is missing; objects are asked for when they are read."""
    if candidate.content is not None or is_s3(candidate.source) or os.path.isfile(candidate.source):
        return candidate
    return Rejection(candidate.key, candidate.source, NO_AUDIO, f"There is no audio file {candidate.source}.")


def stamps_of(lists: Iterable[str], sources: Iterable[str], root: str) -> Iterator[Stamp]:
    """Stamps of the files that list utterances, and of the audio that they name.

    Local audio is looked at file by file; of a corpus in object storage, what lies below its folder is
    listed. Objects elsewhere are known by their names only.
    """
    for path in lists:
        if found := info(path):
            yield name_of(path), found.bytes, found.stamp
    if is_s3(root):
        for found in walk(root if is_folder(root) else parent_of(root)):
            yield found.name, found.bytes, found.stamp
    last = ""
    for source in sources:
        if source == last:
            continue
        last = source
        try:
            status = os.stat(source) if not is_s3(source) else None
        except OSError:
            continue
        yield (source, status.st_size, str(status.st_mtime_ns)) if status else (source, 0, "")
