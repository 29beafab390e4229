"""Compares what the header of an audio file announces with what the file holds.

libsndfile does not report that a file is shorter than its header announces, and returns the samples that
remain. It ignores what follows the announced samples: the rest of a wav with a wrong length, and all streams
but the first of a file that was joined from several. This module finds both faults without decoding, in the
containers RIFF, RIFX, RF64, BW64, W64, AIFF, AIFC, 8SVX, 16SV, CAF, AU, NIST SPHERE and Ogg. The modules
`flac` and `mp3` do the same for FLAC and mp3. libsndfile's other formats are rare, and are checked only by
decoding. A RIFF, RIFX or IFF file that announces 2 GiB or more is not refused if its end is missing, because
a wav that was written to a pipe looks the same.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from slam_asr.audio.faults import TRUNCATED_TEXT, more_than_announced

_PIPE_LENGTH = 0x7FFF_F000
"""Bytes. A wav written to a pipe announces about 2 or 4 GiB, because its length was unknown when the header
was written."""
_UNKNOWN_LENGTH = 2**62
"""Bytes. If the length was unknown, the 64-bit formats announce at least this length, or a negative one."""
_MAX_REST = 128
"""Bytes after the announced samples that are ignored, at most 16 ms of telephone speech. Programs append
marks of their own; an ID3v1 tag has 128 bytes."""
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN", b"3DI")
"""The first bytes of music players' tags, which may follow the audio in any format."""


class ContainerFault(Exception):
    """A fault of a file. The message is the end of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class _ChunkLayout:
    """How a format that consists of chunks arranges them."""

    start: int
    """Offset of the first chunk in bytes."""
    fields: str
    """Name and length of a chunk, for `struct`."""
    samples: bytes
    """Name of the chunk that holds the samples."""
    alignment: int = 2
    """Chunks begin at a multiple of this number of bytes."""
    counted: int = 0
    """Bytes of a chunk's header that are included in the chunk's length."""
    before_samples: int = 0
    """Bytes at the start of the chunk `samples` that come before the first sample."""


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
"""W64 names its chunks by GUIDs of 16 bytes, which begin with the name of the chunk in RIFF."""
_LAYOUTS = {
    b"RIFF": _ChunkLayout(12, "<4sI", b"data"),
    b"RF64": _ChunkLayout(12, "<4sI", b"data"),
    b"BW64": _ChunkLayout(12, "<4sI", b"data"),
    b"RIFX": _ChunkLayout(12, ">4sI", b"data"),
    b"riff": _ChunkLayout(40, "<16sQ", _W64_DATA, alignment=8, counted=24),
    b"caff": _ChunkLayout(8, ">4sq", b"data", alignment=1, before_samples=4),
}
"""The formats with chunks, keyed by the first four bytes of a file. IFF files are in `_FORMS`."""
_AIFF, _SVX = _ChunkLayout(12, ">4sI", b"SSND", before_samples=8), _ChunkLayout(12, ">4sI", b"BODY")
_FORMS = {b"AIFF": _AIFF, b"AIFC": _AIFF, b"8SVX": _SVX, b"16SV": _SVX}
"""The kinds of IFF files."""
_CHUNK_NAME = re.compile(rb"[ -~]{4}.*", re.DOTALL)
"""Matches a name that begins with four printable characters, as every chunk's does."""


def check_length(stream: BinaryIO) -> int | None:
    """Compare the length that a file's header announces with the bytes that the file holds.

    Returns:
        The bytes of samples that the header announces; None if it leaves the length open, or if the format is
        not checked here.

    Raises:
        ContainerFault: the file holds less or more than its header announces, or the header is damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(1024)
    if layout := _layout(head):
        return _check_chunks(stream, layout, size, head[:4])
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:  # AU, big-endian or little-endian
        start, length = struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12])
        if length != 0xFFFF_FFFF:  # this value would leave the length open
            check_end(stream, start + length, size)
            return length
    elif head.startswith(b"NIST_1A\n") and (extent := _sphere_extent(head)):
        check_end(stream, sum(extent), size)
        return extent[1]
    return None


def _layout(head: bytes) -> _ChunkLayout | None:
    """Return the layout of the chunks in a file that begins with `head`; None if it has no chunks."""
    if head[:4] == b"FORM":
        return _FORMS.get(head[8:12])
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and head[8:12] != b"WAVE":
        return None
    return _LAYOUTS.get(head[:4])


def _check_chunks(stream: BinaryIO, layout: _ChunkLayout, size: int, magic: bytes) -> int | None:
    """Compare the chunks of a file with its size in bytes; the result is that of `check_length`."""
    end = long_length = samples = None
    # `end` is where the last accepted chunk ends; None until the chunk with the samples is found.
    for name, start, length in _chunks(stream, layout, size):
        if end is None and name == b"ds64" and magic in (b"RF64", b"BW64"):
            # RF64 has the 64-bit length of the samples here, after that of the file (EBU Tech 3306), and
            # 0xFFFFFFFF where RIFF has a 32-bit length.
            stream.seek(start)
            long_length = struct.unpack("<8xQ", stream.read(16).ljust(16, b"\0"))[0]
        elif end is None and name == layout.samples:
            narrow = layout.fields in ("<4sI", ">4sI")
            if length == 0xFFFF_FFFF and long_length is not None:
                length, narrow = long_length, False
            if _is_unknown(length, start, size, narrow) or (length == 0 and _is_unclosed(stream, magic)):
                return None
            end = start + length
            if end > size:
                raise ContainerFault(TRUNCATED_TEXT)
            samples = length - layout.before_samples
            if name == b"SSND":
                # AIFF may have an offset before the first sample, to align blocks. libsndfile skips that many
                # bytes.
                stream.seek(start)
                samples -= (offset := int.from_bytes(stream.read(4)))
                if offset > _MAX_REST:
                    raise ContainerFault("has a damaged header: its first samples would be missing")
        elif end is not None:
            # If the length is too small, the samples that follow hardly ever look like a complete chunk. A
            # second file that was appended does look like one, so the names that begin a file are excluded.
            if name[:4] in _LAYOUTS or name[:4] == b"FORM" or not _CHUNK_NAME.match(name):
                break
            if start + length > size:
                break
            end = start + length
    if end is not None:
        check_end(stream, end, size)
    return samples


def _chunks(stream: BinaryIO, layout: _ChunkLayout, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, the offset of its content, and the length of its content in bytes."""
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
        # Padding up to the next multiple is not included in the chunk's length.
        position += -position % layout.alignment


def _is_unknown(length: int, start: int, size: int, narrow: bool) -> bool:
    """Return whether a length only means that the samples extend to the end of the file.

    Args:
        length: the announced bytes of samples.
        start: the first sample's place in the file.
        size: the file's bytes.
        narrow: whether the length has 32 bits, so that programs that write to a pipe announce 2 GiB or more.
    """
    if length < 0 or length >= _UNKNOWN_LENGTH:
        return True
    return narrow and length >= _PIPE_LENGTH and start + length > size


def _is_unclosed(stream: BinaryIO, magic: bytes) -> bool:
    """Return whether a wav was never closed by its writer, so that its RIFF chunk still has the length 8.

    libsndfile reads such a file to its end.
    """
    stream.seek(4)
    return struct.unpack(">I" if magic == b"RIFX" else "<I", stream.read(4))[0] == 8


def _sphere_extent(head: bytes) -> tuple[int, int] | None:
    """Return the sizes of a NIST SPHERE file's header and samples, in bytes.

    The result is None if the samples are compressed, or the header does not give their number.

    Raises:
        ContainerFault: the header has no valid size.
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
    """Compare the end of the announced content, as an offset in bytes, with the size of the file.

    Raises:
        ContainerFault: the file ends earlier, or more than `_MAX_REST` bytes follow that are neither a tag
            nor padding.
    """
    if end > size:
        raise ContainerFault(TRUNCATED_TEXT)
    if size - end <= _MAX_REST:
        return
    stream.seek(end)
    if stream.read(16).startswith(_TAGS):
        return
    stream.seek(end)
    while block := stream.read(2**20):
        if block.strip(b"\0"):  # zeros are padding to the size of a sector
            raise ContainerFault(more_than_announced(f"{size - end} more bytes"))


def end_of_tags(content: bytes, position: int) -> int:
    """Return the position after all tags of music players, and all zeros, that begin at `position`."""
    while True:
        rest = content[position : position + 32]
        if rest.startswith(b"TAG"):  # ID3v1
            position += 128
        elif rest.startswith(b"ID3") and len(rest) >= 10:
            # ID3v2 has its size, without the header, in four bytes with 7 bits each, to avoid sync words.
            size = (rest[6] & 127) << 21 | (rest[7] & 127) << 14 | (rest[8] & 127) << 7 | rest[9] & 127
            position += 10 + size
        elif rest.startswith(b"APETAGEX") and len(rest) == 32:
            # The size of an APE tag counts its footer but not its header.
            is_header = rest[23] & 0x20
            position += int.from_bytes(rest[12:16], "little") + 32 if is_header else 32
        elif rest.startswith(b"LYRICSBEGIN"):
            end = content.find(b"LYRICS200", position)
            position = end + 9 if end >= 0 else len(content)
        elif rest[:1] == b"\0":
            position += len(content[position:]) - len(content[position:].lstrip(b"\0"))
        else:
            return position


def joined_ogg(content: bytes) -> list[tuple[int, int]]:
    """Return the offsets in bytes of the start and end of each link of a chained Ogg file (RFC 3533, 4).

    Raises:
        ContainerFault: a page is incomplete, or a link lacks its last page.
    """
    starts = [0]
    last = position = 0
    # A link begins with the first page of each of its streams. So a first page begins another link only if
    # the page before it is not a first page.
    in_headers = True
    while (position := content.find(b"OggS", position)) >= 0:
        page_size = _ogg_page_size(content, position)
        if page_size is None:
            raise ContainerFault(TRUNCATED_TEXT)
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
    """Return the size of an Ogg page in bytes; None if it is not complete (RFC 3533, section 6).

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
        raise ContainerFault(TRUNCATED_TEXT)
