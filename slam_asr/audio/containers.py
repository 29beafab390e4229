"""What the header of an audio file announces, compared with what the file holds.

libsndfile does not report that a file is shorter than its header announces, and returns the samples that
remain. It ignores what follows the announced samples: the rest of a wav with a wrong length, and all streams
but the first of a file that was joined from several. Here both are found from the container alone, without
decoding: RIFF, RIFX, RF64, BW64, W64, AIFF, AIFC, 8SVX, CAF, AU, NIST SPHERE, FLAC and Ogg. `mp3` does the
same for mp3. The remaining formats of libsndfile are rare, and are checked only by decoding.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from slam_asr.audio.faults import TRUNCATED, more_than_announced

_PIPE_LENGTH = 0x7FFF_F000
"""Bytes. A wav written to a pipe announces about 2 or 4 GiB, because its length was unknown when the header
was written."""
_UNKNOWN_LENGTH = 2**62
"""Bytes. The 64-bit formats announce such a length, or a negative one, if it was unknown."""
_MAX_REST = 128
"""Bytes after the announced samples that are ignored, at most 16 ms of telephone speech. Programs append
marks of their own; an ID3v1 tag has 128 bytes."""
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN", b"3DI")
"""How the tags of music players begin, which may follow any format."""


class ContainerFault(Exception):
    """The fault of a file, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class _Chunks:
    """How a format that consists of chunks writes them."""

    start: int
    """Offset of the first chunk in bytes."""
    fields: str
    """Name and length of a chunk, for `struct`."""
    samples: bytes
    """Name of the chunk that holds the samples."""
    alignment: int = 2
    """Chunks begin at a multiple of this number of bytes."""
    counted: int = 0
    """Bytes of its own header that the length of a chunk includes."""
    before_samples: int = 0
    """Bytes of the chunk with the samples that precede them."""


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_CHUNKS = {
    b"RIFF": _Chunks(12, "<4sI", b"data"),
    b"RF64": _Chunks(12, "<4sI", b"data"),
    b"BW64": _Chunks(12, "<4sI", b"data"),
    b"RIFX": _Chunks(12, ">4sI", b"data"),
    b"riff": _Chunks(40, "<16sQ", _W64_DATA, alignment=8, counted=24),
    b"caff": _Chunks(8, ">4sq", b"data", alignment=1, before_samples=4),
}
_FORMS = {b"AIFF": b"SSND", b"AIFC": b"SSND", b"8SVX": b"BODY", b"16SV": b"BODY"}
"""The kinds of IFF files, and the name of the chunk with their samples."""
_CHUNK_NAME = re.compile(rb"[ -~]{4}.*", re.DOTALL)


def check_length(stream: BinaryIO) -> int | None:
    """Compare the length that a file's header announces with the bytes that the file holds.

    Returns:
        The bytes of samples that the header announces; None if it leaves the length open, or if the format is
        not checked here.

    Raises:
        ContainerFault: the file holds less or more than its header announces.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(1024)
    if layout := _layout(head):
        return _check_chunks(stream, layout, size, head[:4])
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        start, length = struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12])
        if length != 0xFFFF_FFFF:
            check_end(stream, start + length, size)
            return length
    elif head.startswith(b"NIST_1A\n") and (extent := _sphere_extent(head)):
        check_end(stream, sum(extent), size)
        return extent[1]
    return None


def _layout(head: bytes) -> _Chunks | None:
    """How the file with this beginning writes its chunks; None if it has none."""
    if head[:4] == b"FORM" and head[8:12] in _FORMS:
        samples = _FORMS[head[8:12]]
        return _Chunks(12, ">4sI", samples, before_samples=8 if samples == b"SSND" else 0)
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and head[8:12] != b"WAVE":
        return None
    return _CHUNKS.get(head[:4])


def _check_chunks(stream: BinaryIO, layout: _Chunks, size: int, magic: bytes) -> int | None:
    end = long_length = samples = None
    for name, start, length in _chunks(stream, layout, size):
        if end is None and name == b"ds64" and magic in (b"RF64", b"BW64"):
            stream.seek(start)
            long_length = struct.unpack("<8xQ", stream.read(16).ljust(16, b"\0"))[0]
        elif end is None and name == layout.samples:
            if length == 0xFFFF_FFFF and long_length is not None:
                length = long_length
            if _is_unknown(length, start, size, layout) or (length == 0 and _is_unclosed(stream, magic)):
                return None
            end = start + length
            if end > size:
                raise ContainerFault(TRUNCATED)
            samples = length - layout.before_samples
            if name == b"SSND":
                stream.seek(start)
                samples -= (offset := int.from_bytes(stream.read(4)))
                if offset > _MAX_REST:
                    raise ContainerFault("has a damaged header: its first samples would be missing")
        elif end is not None:
            # The samples of a file with a wrong length hardly ever look like a complete chunk, whereas a file
            # that was appended to this one does.
            if name[:4] in _CHUNKS or name[:4] == b"FORM" or not _CHUNK_NAME.match(name):
                break
            if start + length > size:
                break
            end = start + length
    if end is not None:
        check_end(stream, end, size)
    return samples


def _chunks(stream: BinaryIO, layout: _Chunks, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, the start and the length in bytes of each chunk. The start is that of its content."""
    header = struct.calcsize(layout.fields)
    position = layout.start
    while position + header <= size:
        stream.seek(position)
        name, length = struct.unpack(layout.fields, stream.read(header))
        length -= layout.counted
        start = position + header
        yield name, start, length
        if length < 0:
            return
        position = start + length
        position += -position % layout.alignment


def _is_unknown(length: int, start: int, size: int, layout: _Chunks) -> bool:
    """Whether a length only says that the samples extend to the end of the file."""
    if length < 0 or length >= _UNKNOWN_LENGTH:
        return True
    return layout.fields in ("<4sI", ">4sI") and length >= _PIPE_LENGTH and start + length > size


def _is_unclosed(stream: BinaryIO, magic: bytes) -> bool:
    """Whether a wav was never closed by its writer: libsndfile then reads it to the end of the file."""
    stream.seek(4)
    return struct.unpack(">I" if magic == b"RIFX" else "<I", stream.read(4))[0] == 8


def _sphere_extent(head: bytes) -> tuple[int, int] | None:
    """The bytes of the header and of the samples of a NIST SPHERE file.

    None if the samples are compressed or not counted.
    """
    fields = dict(re.findall(rb"^(\w+) -i (\d{1,15})\s*$", head, re.MULTILINE))
    counts = [fields.get(name) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    coding = re.search(rb"^sample_coding -s\d+ (.*)$", head, re.MULTILINE)
    size = re.fullmatch(rb" *(\d+)\n", head[8:16])
    if size is None:
        raise ContainerFault("has a damaged NIST header: the size of the header is not a number")
    if None in counts or (coding and b"embedded" in coding[1]):
        return None
    samples, channels, sample_bytes = (int(count or 0) for count in counts)
    return int(size[1]), samples * channels * sample_bytes


def check_end(stream: BinaryIO, end: int, size: int) -> None:
    """Compare the end of the announced content, in bytes, with that of the file."""
    if end > size:
        raise ContainerFault(TRUNCATED)
    if size - end <= _MAX_REST:
        return
    stream.seek(end)
    first = stream.read(16)
    if first.startswith(_TAGS):
        return
    stream.seek(end)
    while block := stream.read(2**20):
        if block.strip(b"\0"):  # zeros are padding to the size of a sector
            raise ContainerFault(more_than_announced(f"{size - end} more bytes"))


def joined_flac(content: bytes) -> list[tuple[int, int]]:
    """Return where each FLAC file in `content` begins and ends: several if files were appended to each other.

    Raises:
        ContainerFault: the last frame has another position than the header announces.
    """
    starts, position = [], content.find(b"fLaC")
    while position >= 0:
        # STREAMINFO is always the first block of metadata, and has 34 bytes.
        if content[position + 4 : position + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            starts.append(position)
        position = content.find(b"fLaC", position + 4)
    parts = list(pairwise([*starts, len(content)]))
    for start, end in parts:
        announced, held = _flac_lengths(content, start, end)
        if announced and held is not None and held > announced:
            raise ContainerFault(more_than_announced(f"{held} samples instead of {announced}"))
    return parts


_FLAC_BLOCK = {
    1: 192,
    **{i: 576 << (i - 2) for i in range(2, 6)},
    **{i: 256 << (i - 8) for i in range(8, 16)},
}
"""Samples per frame by its code (RFC 9639, section 9.1.1)."""
_FLAC_TAIL = 2**15
"""Bytes at the end of a file in which its last frame is searched."""


def _flac_lengths(content: bytes, start: int, end: int) -> tuple[int, int | None]:
    """The number of samples that a FLAC header announces, and the number after the last frame, if found."""
    info = content[start + 8 : start + 42]
    if len(info) < 34:
        return 0, None
    block = int.from_bytes(info[:2])
    announced = int.from_bytes(info[13:18]) & 0xF_FFFF_FFFF
    if content[end - 128 : end - 125] == b"TAG":  # an ID3v1 tag
        end -= 128
    tail = content[max(start + 42, end - _FLAC_TAIL) : end]
    limit = len(tail)
    while (position := max(tail.rfind(b"\xff\xf8", 0, limit), tail.rfind(b"\xff\xf9", 0, limit))) >= 0:
        held = _flac_frame_end(tail[position : position + 16], block)
        # Compressed samples may look like the header of a frame, but then the checksum of the frame is wrong.
        # It is computed only if the frame contradicts the header, since it takes milliseconds.
        if held == announced or (held is not None and _crc16(tail[position:]) == 0):
            return announced, held
        limit = position + 1
    return announced, None


def _flac_frame_end(head: bytes, block: int) -> int | None:
    """The number of samples up to the end of the frame that begins so; None if it is not a frame's header."""
    if len(head) < 6:
        return None
    code = head[2] >> 4
    extra = 8 - (~head[4] & 0xFF).bit_length() if head[4] >= 0xC0 else int(head[4] < 0x80)
    if not code or not extra or extra > 7 or len(head) < 4 + extra:
        return None
    number = head[4] if extra == 1 else head[4] & (0x7F >> extra)
    for byte in head[5 : 4 + extra]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 0x3F
    after = 4 + extra
    samples = _FLAC_BLOCK.get(code) or int.from_bytes(head[after : after + code - 5]) + 1
    return (number if head[1] & 1 else number * block) + samples


def _crc16_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x8005 if value & 0x8000 else value << 1) & 0xFFFF
        table.append(value)
    return table


_CRC16 = _crc16_table()


def _crc16(frame: bytes) -> int:
    """The CRC of a FLAC frame with its own checksum at its end: 0 if it is complete (RFC 9639, 9.3)."""
    value = 0
    for byte in frame:
        value = (value << 8 & 0xFFFF) ^ _CRC16[value >> 8 ^ byte]
    return value


def joined_ogg(content: bytes) -> list[tuple[int, int]]:
    """Return where each link of a chained Ogg file begins and ends (RFC 3533, section 4).

    Raises:
        ContainerFault: a link lacks its last page.
    """
    starts = [0]
    last = position = 0
    in_headers = True
    while (position := content.find(b"OggS", position)) >= 0:
        page_size = _ogg_page_size(content, position)
        if page_size is None:
            raise ContainerFault(TRUNCATED)
        begins = bool(content[position + 5] & 0x02)
        if begins and not in_headers:
            _require_last_page(content, last)
            starts.append(position)
        in_headers = begins
        last = position
        position += page_size
    _require_last_page(content, last)
    return list(zip(starts, [*starts[1:], len(content)], strict=True))


def _ogg_page_size(content: bytes, start: int) -> int | None:
    """The size of an Ogg page in bytes; None if it is not complete (RFC 3533, section 6).

    A page has a header of 27 bytes, whose last byte is the number of segments; then, for each segment, a byte
    with its size; then the segments.
    """
    if start + 27 > len(content):
        return None
    segments = content[start + 26]
    size = 27 + segments + sum(content[start + 27 : start + 27 + segments])
    return size if start + size <= len(content) else None


def _require_last_page(content: bytes, start: int) -> None:
    if not content[start + 5] & 0x04:  # byte 5 holds the flags, 0x04 is "end of stream"
        raise ContainerFault(TRUNCATED)
