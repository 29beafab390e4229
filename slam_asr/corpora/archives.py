"""Reader for LibriSpeech's original archives, such as train-clean-100.tar.gz, on disk or in object storage.

Archives are unpacked as a stream into `audio/` of the stage's folder, and then read by `librispeech`. An
archive with one of LibriSpeech's names is assumed to hold the subset of that name, and is not opened if no
pattern of the recipe matches it. Any other archive is read once to find its subsets. An archive that was
unpacked completely is not unpacked again.
"""

import contextlib
import lzma
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from slam_asr.config.recipe import Data
from slam_asr.corpora import AUDIO_FOLDER, Candidate, CorpusReader, Item, Stamp
from slam_asr.corpora.librispeech import OUTER, TREE_SUFFIXES, LibriSpeech
from slam_asr.corpora.places import files_at
from slam_asr.errors import InputError
from slam_asr.progress import Meter
from slam_asr.storage import digest, info, name_of, open_stream, read_bytes

_MAX_EXPANSION = 100
"""Largest ratio of the unpacked size to the archive's size. Audio hardly shrinks, so only an archive that was
built to fill a disk exceeds this ratio."""
_MIN_ALLOWANCE = 2**30
"""Unpacked size in bytes that is allowed for an archive of any size."""
_MAX_METADATA = 2**20
"""Largest size in bytes of a long name or another extended header, which tarfile reads into memory."""
SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz")
_ORIGINAL_NAME = re.compile(r"((?:train|dev|test)-(?:clean|other)(?:-\d+)?)\.(?:tar\.gz|tgz|tar)")


class Archives(CorpusReader):
    """The reader of one archive, or of a folder of archives."""

    kind = "LibriSpeech archives"
    layout = "LibriSpeech archives (such as train-clean-100.tar.gz)"

    def __init__(self, root: str, files: list[str]) -> None:
        self.root = root
        self.by_subset: dict[str, str] = {}
        """The archive of each subset."""
        for file in files:
            for subset in _subsets_in(file):
                if subset in self.by_subset:
                    raise InputError(
                        f"{self.by_subset[subset]} and {file} both hold the subset {subset}: "
                        "remove one of them."
                    )
                self.by_subset[subset] = file
        self._tree: LibriSpeech | None = None
        self._folder = Path()

    @classmethod
    def find(cls, root: str, data: Data) -> "Archives | None":
        """Open the archives at a path; return None if the path has none.

        Raises:
            InputError: an archive is damaged, holds no LibriSpeech tree, or holds a subset that another has.
        """
        files = files_at(root, SUFFIXES)
        return cls(root, files) if files else None

    def stamps(self, subset: str) -> Iterator[Stamp]:
        if archive := info(self.by_subset[subset]):
            yield archive.name, archive.bytes, archive.stamp

    def prepare(self, folder: Path, subsets: list[str]) -> None:
        """Unpack the archives of these subsets.

        Raises:
            InputError: an archive is damaged, lacks the subset that its name promises, unpacks to far more
                than audio can, or does not fit on the disk.
        """
        self._folder = folder
        target = folder / AUDIO_FOLDER
        for file in sorted({self.by_subset[subset] for subset in subsets}):
            _unpack_once(file, target, [subset for subset, other in self.by_subset.items() if other == file])
        self._tree = LibriSpeech(self.root, {subset: str(target / OUTER / subset) for subset in subsets})
        for subset in subsets:
            if not (target / OUTER / subset).is_dir():
                raise InputError(
                    f"{self.by_subset[subset]} holds no {OUTER}/{subset}, although its name says so: "
                    "download it again."
                )

    def read(self, subset: str) -> Iterator[Item]:
        assert self._tree is not None, "prepare() unpacks the archives before read()"
        for item in self._tree.read(subset):
            if isinstance(item, Candidate):
                # The path is relative to the manifest, so that the stage's folder can be moved or uploaded.
                item.manifest_source = Path(item.source).relative_to(self._folder).as_posix()
            yield item


def _subsets_in(file: str) -> list[str]:
    """Return the subsets that an archive holds, by its name if it is one of LibriSpeech's, or its content."""
    if original := _ORIGINAL_NAME.fullmatch(name_of(file).lower()):
        return [original[1]]
    with _members(file) as members:
        subsets = sorted({path.parts[1] for _, path, _ in members})
    if not subsets:
        raise InputError(
            f"The archive {file} holds no LibriSpeech tree (<subset>/<speaker>/<chapter>/): "
            "unpack it, and give the folder."
        )
    return subsets


def _unpack_once(file: str, target: Path, subsets: list[str]) -> None:
    """Unpack an archive, unless a marker file shows that this version of it was unpacked before."""
    archive_info = info(file)
    state = digest([file, archive_info.bytes, archive_info.stamp]) if archive_info else ""
    marker = target / f".{digest(file)[:16]}.unpacked"
    if marker.is_file() and read_bytes(marker).decode() == state:
        return
    # The marker is removed first and written last, so it never marks partial content.
    marker.unlink(missing_ok=True)
    for subset in subsets:
        shutil.rmtree(target / OUTER / subset, ignore_errors=True)
    remaining = max(_MIN_ALLOWANCE, _MAX_EXPANSION * archive_info.bytes) if archive_info else _MIN_ALLOWANCE
    with _members(file) as members, Meter(f"unpacking {name_of(file)}", unit="files") as meter:
        for archive, path, member in members:
            remaining -= member.size
            _require_space(file, target, member, remaining)
            unpacked = target / path
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None, "_members gives regular files only"
            with content, open(unpacked, "wb") as copy:
                shutil.copyfileobj(content, copy, 2**20)
            meter.update()
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(state, encoding="utf-8")


def _require_space(file: str, target: Path, member: tarfile.TarInfo, remaining: int) -> None:
    """Refuse an archive that unpacks to far more than audio can, or to more than the disk holds.

    Args:
        file: the archive, for messages.
        target: the existing folder to unpack to, or one to be created.
        member: the file to unpack next.
        remaining: bytes that may still be unpacked after this file; negative if the archive is too large.
    """
    if remaining < 0:
        raise InputError(
            f"The archive {file} unpacks to more than {_MAX_EXPANSION} times its size, unlike audio: "
            "download it again from its publisher."
        )
    target.mkdir(parents=True, exist_ok=True)
    # Checked for each file, because other programs may write to the disk too.
    free = shutil.disk_usage(target).free
    if member.size > free:
        raise InputError(
            f"The archive {file} does not fit on the disk: {member.name} has {member.size} bytes, and {free} "
            f"are free at {target}."
        )


class _BoundedTarInfo(tarfile.TarInfo):
    """The header of a member, with a limit on the size of its extensions."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile reads an extension into memory, whatever its announced size is.
        is_extension = self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES)
        if is_extension and self.size > _MAX_METADATA:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # absent from typeshed


_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@contextlib.contextmanager
def _members(file: str) -> Iterator[Iterator[tuple[tarfile.TarFile, PurePosixPath, tarfile.TarInfo]]]:
    """Open an archive as a stream, and yield an iterator over the files of its LibriSpeech tree.

    Each item is the open archive, the path to unpack to (LibriSpeech/<subset>/<speaker>/<chapter>/<file>) and
    the member. Links, devices and paths that lead out of the target folder are omitted.
    """
    # Mode `r|*` never seeks, so an archive in object storage needs no local copy. But a member can be read
    # only before the iterator advances to the next one.
    try:
        with (
            open_stream(file) as stream,
            tarfile.open(None, "r|*", stream, tarinfo=_BoundedTarInfo) as archive,
        ):
            yield ((archive, path, member) for member in archive if (path := _path_of(member)))
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"The archive {file} cannot be unpacked ({reason}): download it again.") from error


def _path_of(member: tarfile.TarInfo) -> PurePosixPath | None:
    """Return the path to unpack a member to, below the target folder; None if it is not part of a tree."""
    parts = [part for part in PurePosixPath(member.name).parts if part != "."]
    parts = parts[1:] if parts[:1] == [OUTER] else parts
    # `..` and hidden files begin with a dot. The first part of an absolute path is a slash.
    if any(part.startswith((".", "/")) or "\0" in part for part in parts):
        return None
    is_in_chapter = len(parts) == 4 and member.isreg() and parts[3].lower().endswith(TREE_SUFFIXES)
    return PurePosixPath(OUTER, *parts) if is_in_chapter else None
