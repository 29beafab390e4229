"""LibriSpeech as it is downloaded: train-clean-100.tar.gz and its like, one or several, local or s3://.

Archives are unpacked as they stream, into `audio/` of the stage's folder, and read as a tree from
there. The original archives are told by their names, and those that no pattern of the recipe asks
for are not opened; of any other, the subsets are found by reading it once. An archive that was
unpacked to its end is not unpacked again.
"""

import contextlib
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from slam_asr.corpora import AUDIO_FOLDER, AUDIO_SUFFIXES, Candidate, Rejection, Stamp
from slam_asr.corpora.librispeech import OUTER, TRANSCRIPTS, LibriSpeech
from slam_asr.corpora.places import files_in, is_file
from slam_asr.errors import UserError
from slam_asr.progress import Meter
from slam_asr.recipe import Data
from slam_asr.storage import digest, info, name_of, open_stream, read_bytes

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz")
LAYOUT = "LibriSpeech's archives (train-clean-100.tar.gz and its like)"
_ORIGINAL = re.compile(r"((?:train|dev|test)-(?:clean|other)(?:-\d+)?)\.(?:tar\.gz|tgz|tar)")


class Archives:
    """The reader of one archive, or of a folder of them."""

    kind = "LibriSpeech archives"

    def __init__(self, root: str, files: list[str]) -> None:
        self.root = root
        self.files: dict[str, str] = {}
        """Archives by subset."""
        for file in files:
            for subset in _subsets_in(file):
                if subset in self.files:
                    raise UserError(
                        f"{self.files[subset]} and {file} both hold the subset {subset}: take one of them away."
                    )
                self.files[subset] = file
        self._tree: LibriSpeech | None = None
        self._folder = Path()

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Archives | None":
        """The archives at a path, or None where there is none.

        Raises:
            UserError: an archive is damaged, or holds no LibriSpeech.
        """
        root = os.fspath(root)
        one = root.lower().endswith(SUFFIXES) and is_file(root)
        files = [root] if one else files_in(root, SUFFIXES)
        return cls(root, files) if files else None

    def subsets(self) -> list[str]:
        return sorted(self.files)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        found = info(self.files[subset])
        if found:
            yield found.name, found.bytes, found.stamp

    def prepare(self, folder: Path, subsets: list[str]) -> None:
        """Unpack the archives of these subsets."""
        self._folder = folder
        target = folder / AUDIO_FOLDER
        for file in sorted({self.files[subset] for subset in subsets}):
            _unpack_once(file, target, [subset for subset, its in self.files.items() if its == file])
        self._tree = LibriSpeech(self.root, {subset: str(target / OUTER / subset) for subset in subsets})
        for subset in subsets:
            if not (target / OUTER / subset).is_dir():
                raise UserError(
                    f"{self.files[subset]} holds no {OUTER}/{subset}, as its name says: download it again."
                )

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        for item in self._tree.read(subset):
            if isinstance(item, Candidate):
                # Relative to the manifest, so that the stage's folder can be moved and published.
                item.listed = Path(item.source).relative_to(self._folder).as_posix()
            yield item


def _subsets_in(file: str) -> list[str]:
    if original := _ORIGINAL.fullmatch(name_of(file).lower()):
        return [original[1]]
    with _members(file) as members:
        subsets = sorted({path.parts[1] for _, path, _ in members})
    if not subsets:
        raise UserError(
            f"The archive {file} holds no LibriSpeech tree (<subset>/<speaker>/<chapter>/): unpack it, and name the folder of what lies there."
        )
    return subsets


def _unpack_once(file: str, target: Path, subsets: list[str]) -> None:
    """Unpack an archive, unless that was done before; a marker that is written last says so."""
    known = info(file)
    state = digest([file, known.bytes, known.stamp]) if known else ""
    marker = target / f".{digest(file)[:16]}.unpacked"
    if marker.is_file() and read_bytes(marker).decode() == state:
        return
    marker.unlink(missing_ok=True)
    for subset in subsets:
        shutil.rmtree(target / OUTER / subset, ignore_errors=True)
    with _members(file) as members, Meter(f"unpacking {name_of(file)}", unit="files") as meter:
        for archive, path, member in members:
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as packed, open(place, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
            meter.update()
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(state)


@contextlib.contextmanager
def _members(file: str) -> Iterator[Iterator[tuple[tarfile.TarFile, PurePosixPath, tarfile.TarInfo]]]:
    """The files of a LibriSpeech tree in an archive as it streams, with their paths: LibriSpeech/subset/….

    Only regular files with such paths are given: what is_coordinator elsewhere, links and devices are not.
    """
    try:
        with open_stream(file) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            yield ((archive, path, member) for member in archive if (path := _place_of(member)))
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(
            f"The archive {file} cannot be unpacked ({' '.join(str(error).split())[:100]}): download it again."
        ) from error


def _place_of(member: tarfile.TarInfo) -> PurePosixPath | None:
    parts = [part for part in PurePosixPath(member.name).parts if part != "."]
    parts = parts[1:] if parts[:1] == [OUTER] else parts
    if (
        len(parts) != 4
        or not member.isreg()
        or any(part.startswith((".", "/")) or "\0" in part for part in parts)
    ):
        return None
    return PurePosixPath(OUTER, *parts) if parts[3].lower().endswith((TRANSCRIPTS, *AUDIO_SUFFIXES)) else None
