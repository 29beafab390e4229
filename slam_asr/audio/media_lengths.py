"""Checks whether the files of phones and browsers are complete, from their structure and without decoding.

ffmpeg decodes what remains of a truncated file and reports no error, and it skips damage between two frames.
Here every box, element, object or frame of MP4, WebM, WMA, AMR and AAC is followed to the end of the file.
Some recorders cannot write a length (MediaRecorder in a browser, AAC and AMR without a container). Their
files are refused if they were cut within a frame, but not if they were cut between two frames.
"""

import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from slam_asr.audio.containers import ContainerFault, check_end, check_length
from slam_asr.audio.faults import TRUNCATED_TEXT

ENCRYPTED = "is encrypted: save it without protection"
"""The fault of a file that only the player of a music shop can decode; the file's name comes before it."""

_MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
"""Boxes on the way to the tables of samples (ISO/IEC 14496-12)."""
_ENCRYPTED_SAMPLES = {b"enca", b"drms"}
"""Sample entries of encrypted audio: common encryption, and the music shop of iTunes."""
_SAMPLE_COUNTS = {b"stsz": 8, b"trun": 4}
"""Boxes with a number of samples, and the offset of that number in bytes."""

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_EBML_PARENTS = {_SEGMENT, _CLUSTER, 0x1654AE6B, 0xAE, 0x6D80, 0x6240}
"""Matroska's Segment and Cluster; Tracks, TrackEntry, ContentEncodings and ContentEncoding (RFC 9559)."""
_EBML_ENCRYPTION = 0x5035

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_ENCRYPTION = (
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)
"""Identifiers of objects: the header, and the two kinds of content encryption (ASF, section 10)."""

_AMR_SIZES = {
    b"#!AMR\n": (13, 14, 16, 18, 20, 21, 27, 32, 6, 1, 1, 1, 1, 1, 1, 1),
    b"#!AMR-WB\n": (18, 24, 33, 37, 41, 47, 51, 59, 61, 6, 1, 1, 1, 1, 1, 1),
}
"""Size in bytes of each type of frame, keyed by the first bytes of a file (RFC 4867, section 5)."""
_ADTS_HEADER = 7

_MAGICS = {b"\x1a\x45\xdf\xa3": "matroska", _ASF_HEADER: "asf", **dict.fromkeys(_AMR_SIZES, "amr")}
"""ffmpeg's names of formats, keyed by the first bytes of a file."""


def kind_of(head: bytes) -> str | None:
    """Recognise a format that only ffmpeg reads, by the first 16 bytes of a file.

    Returns:
        ffmpeg's name of the format, or None.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    by_magic = next((kind for magic, kind in _MAGICS.items() if head.startswith(magic)), None)
    return by_magic or ("aac" if _is_adts(head) else None)


def check_media(stream: BinaryIO, kind: str) -> None:
    """Follow the structure of a file to its end.

    Args:
        stream: the file.
        kind: ffmpeg's name of its format.

    Raises:
        ContainerFault: the file ends too early, is encrypted, or holds something other than its format.
    """
    FORMATS[kind][1](stream, stream.seek(0, os.SEEK_END))


def _at(stream: BinaryIO, position: int, count: int) -> bytes:
    """Read `count` bytes at a position, padded with zeros at the end of the file."""
    stream.seek(position)
    return stream.read(count).ljust(count, b"\0")


def _check_mp4(stream: BinaryIO, size: int) -> None:
    names = set()
    last = 0
    for name, start, end in _boxes(stream, size):
        names.add(name)
        last = end
        if name == b"stsd" and _at(stream, start + 12, 4) in _ENCRYPTED_SAMPLES:
            raise ContainerFault(ENCRYPTED)
        if name in _SAMPLE_COUNTS:
            (count,) = struct.unpack(">I", _at(stream, start + _SAMPLE_COUNTS[name], 4))
            # A sample has at least one byte. ffmpeg would allocate memory for all announced samples.
            if count > size:
                raise ContainerFault(f"is damaged: it cannot hold {count} samples")
    if b"moov" not in names:
        raise ContainerFault(TRUNCATED_TEXT)
    check_end(stream, last, size)


def _boxes(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each box, and the offsets of its content's start and end in bytes, parents first."""
    position = 0
    while position + 8 <= size:
        length, name = struct.unpack(">I4s", _at(stream, position, 8))
        start = position + 8
        # A length of 1 means that a length of 64 bits follows the name; 0 means up to the end of the file.
        if length == 1:
            (length,) = struct.unpack(">Q", _at(stream, start, 8))
            start += 8
        end = position + length if length else size
        if not name.strip(b"\0") and not length:
            return  # zeros: padding
        if end > size:
            raise ContainerFault(TRUNCATED_TEXT)
        if end < start:
            raise ContainerFault("is damaged: a box of its header has an impossible length")
        yield name, start, end
        position = start if name in _MP4_PARENTS else end


def _check_matroska(stream: BinaryIO, size: int) -> None:
    position = 0
    while position < size:
        head = _at(stream, position, 12)
        identifier, id_bytes = _ebml_number(head, marked=True)
        length, length_bytes = _ebml_number(head[id_bytes:], marked=False)
        if not id_bytes or id_bytes > 4 or not length_bytes:
            return check_end(stream, position, size)
        start = position + id_bytes + length_bytes
        # If all bits are 1, the length is unknown: the recorder could not return to the beginning of the
        # file.
        is_open = length == (1 << 7 * length_bytes) - 1
        if not is_open and start + length > size:
            raise ContainerFault(TRUNCATED_TEXT)
        if identifier == _EBML_ENCRYPTION:
            raise ContainerFault(ENCRYPTED)
        if is_open and identifier not in (_SEGMENT, _CLUSTER):
            raise ContainerFault("is damaged: an element has no length")
        # An open Segment or Cluster is a parent too, so its length is not needed.
        position = start if identifier in _EBML_PARENTS else start + length
    return None


def _ebml_number(data: bytes, marked: bool) -> tuple[int, int]:
    """Parse a number of variable length (RFC 8794, section 4), with or without the bit that marks its length.

    Returns:
        The number, and its length in bytes, which is 0 if no number begins here.
    """
    if not data or not data[0]:
        return 0, 0
    # The number of zeros before the first 1 gives the number of bytes that follow.
    count = 9 - data[0].bit_length()
    number = int.from_bytes(data[:count])
    return (number if marked else number & ((1 << 7 * count) - 1)), count


def _check_asf(stream: BinaryIO, size: int) -> None:
    position = 0
    while position + 24 <= size:
        name, length = struct.unpack("<16sQ", _at(stream, position, 24))
        if position + length > size:
            raise ContainerFault(TRUNCATED_TEXT)
        if name == _ASF_HEADER and any(kind in _at(stream, position, length) for kind in _ASF_ENCRYPTION):
            raise ContainerFault(ENCRYPTED)
        if length < 24:
            # The length of the recording was unknown. Its packets follow.
            return
        position += length
    check_end(stream, position, size)


def _check_amr(stream: BinaryIO, size: int) -> None:
    content = _at(stream, 0, size)
    magic = next(magic for magic in _AMR_SIZES if content.startswith(magic))
    sizes, position = _AMR_SIZES[magic], len(magic)
    while position < size:
        # A frame's first byte has the frame's type in the 4 bits after its first bit.
        position += sizes[content[position] >> 3 & 15]
    if position > size:
        raise ContainerFault(TRUNCATED_TEXT)


def _check_adts(stream: BinaryIO, size: int) -> None:
    position = 0
    while position + _ADTS_HEADER <= size:
        head = _at(stream, position, _ADTS_HEADER)
        # The length of a frame, with its header, has 13 bits: the last 2 of the fourth byte, the fifth byte,
        # and the first 3 of the sixth.
        length = int.from_bytes(head[3:6]) >> 5 & 0x1FFF
        if not _is_adts(head) or length < _ADTS_HEADER:
            break
        position += length
    check_end(stream, position, size)


def _is_adts(head: bytes) -> bool:
    """Return whether `head` begins an AAC frame: 12 bits of 1, and layer 0 (ISO/IEC 14496-3, 1.A.2)."""
    return len(head) >= 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0


FORMATS: dict[str, tuple[str, Callable[[BinaryIO, int], object]]] = {
    "mov": ("MP4 or QuickTime", _check_mp4),
    "matroska": ("WebM or Matroska", _check_matroska),
    "asf": ("Windows Media", _check_asf),
    "amr": ("AMR", _check_amr),
    "aac": ("AAC", _check_adts),
    "caf": ("CAF", lambda stream, size: check_length(stream)),
}
"""The name of each format in messages, and the check of its structure, by ffmpeg's name of the format."""
