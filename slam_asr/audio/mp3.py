"""Exact access to mp3: every frame is found and counted, and any stretch is decoded without what precedes it.

The length that libsndfile reports for an mp3 is not reliable. It is the count in the first Xing header even
if more streams follow, and without such a header it is an estimate from the bit rate. Its seeking is not
exact either. A frame header gives the size of its frame, however, so that all frames of a file are found in
milliseconds. A stretch is decoded from copies of its frames, preceded by those that its first frame depends
on. The samples are then equal to those of the complete file, bit by bit.
"""

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile

from slam_asr.audio.faults import TRUNCATED
from slam_asr.audio.containers import ContainerFault

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sample rates in Hz by the two bits of a header that give the MPEG version."""
_BIT_RATES = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""kbit/s by whether the version is MPEG 1, and by the two bits of a header that give the layer."""
_DECODER_DELAY = 529
"""Samples by which every mp3 decoder lags; LAME's tag does not include them."""
_RESERVOIR = 511
"""Bytes of earlier frames that a frame of layer III may use at most."""
_FRAME_OVERHEAD = 38
"""Bytes of a frame, at most, that are not part of that reservoir: header, checksum and side information."""
_WARM_UP = 3
"""Frames after which the state of the decoder (overlap and filter bank) no longer depends on its start."""
_COUNT_TOLERANCE = 2
"""Frames by which the count of a Xing header may differ: some encoders count the header's own frame."""
_MAX_JUNK = 4096
"""Bytes after the last frame that are ignored."""
_BLOCK = 2**18
"""Samples decoded at once."""


def _frame_sizes() -> list[int]:
    """The size of a frame in bytes by the second and third byte of its header; 0 if they are not valid."""
    sizes = [0] * 2**16
    for bits in range(0xE000, 0x10000):
        version, layer = bits >> 11 & 3, bits >> 9 & 3
        bit_rate, rate, padding = bits >> 4 & 15, bits >> 2 & 3, bits >> 1 & 1
        if version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
            continue
        bits_per_second = _BIT_RATES[version == 3, layer][bit_rate - 1] * 1000
        if layer == 3:
            sizes[bits] = (12 * bits_per_second // _RATES[version][rate] + padding) * 4
        else:
            factor = 72 if layer == 1 and version != 3 else 144
            sizes[bits] = factor * bits_per_second // _RATES[version][rate] + padding
    return sizes


_SIZES = _frame_sizes()


@dataclass(frozen=True)
class _Part:
    """A run of frames that one encoder wrote."""

    offsets: np.ndarray
    """int64 [frames + 1]: where each frame begins in the file, in bytes, and where the last one ends."""
    delay: int = 0
    """Samples at the start that the encoder added, with the decoder's delay."""
    padding: int = 0
    """Samples at the end that are not part of the recording."""


@dataclass(frozen=True)
class Mp3:
    """Where the frames of an mp3 file are, and how many samples they hold."""

    parts: tuple[_Part, ...]
    header: bytes
    """The first frame's header, 4 bytes."""

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return _RATES[self.header[1] >> 3 & 3][self.header[2] >> 2 & 3]

    @property
    def channels(self) -> int:
        return 1 if self.header[3] >> 6 == 3 else 2

    @property
    def samples_per_frame(self) -> int:
        layer, first_version = self.header[1] >> 1 & 3, self.header[1] >> 3 & 3 == 3
        return 384 if layer == 3 else 576 if layer == 1 and not first_version else 1152

    def _samples_of(self, part: _Part) -> int:
        return max(0, (len(part.offsets) - 1) * self.samples_per_frame - part.delay - part.padding)

    @property
    def frames(self) -> int:
        """Samples per channel of the complete file."""
        return sum(map(self._samples_of, self.parts))

    def blocks(self, stream: BinaryIO, first: int, count: int) -> Iterator[np.ndarray]:
        """Decode a stretch of the file, given as `stream`; yield float32 [samples, channels] in order.

        Fewer samples result if a frame is damaged.

        Args:
            stream: the file.
            first: number of the first sample, from 0.
            count: number of samples.
        """
        for part in self.parts:
            samples = self._samples_of(part)
            if first < samples and count > 0:
                taken = min(count, samples - first)
                yield from self._blocks_of(part, stream, first + part.delay, taken)
                count -= taken
            first = max(0, first - samples)

    def _blocks_of(self, part: _Part, stream: BinaryIO, first: int, count: int) -> Iterator[np.ndarray]:
        """Decode samples of a part; `first` counts the samples that the decoder gives, with the delay."""
        size = self.samples_per_frame
        begin, end = first // size, min(-(-(first + count) // size), len(part.offsets) - 1)
        needed = _needed_frame(part.offsets, begin)
        stream.seek(int(part.offsets[needed]))
        content = stream.read(int(part.offsets[end] - part.offsets[needed]))
        with soundfile.SoundFile(io.BytesIO(self._counting_frame(end - needed) + content)) as sound:
            skipped = first - needed * size
            while skipped and len(block := sound.read(min(skipped, _BLOCK), "float32", always_2d=True)):
                skipped -= len(block)
            while count and len(block := sound.read(min(count, _BLOCK), "float32", always_2d=True)):
                count -= len(block)
                yield block

    def _counting_frame(self, frames: int) -> bytes:
        """A frame with a Xing header, from which libsndfile learns the number of frames. It gives no samples.

        Without it, libsndfile would estimate the length from the bit rate, and cut what is longer.
        """
        # A bit rate of 128 kbit/s or more leaves room for the header at every sample rate.
        second = self.header[1] | 1  # no checksum
        third = (13 << 4) | (self.header[2] & 0x0C)
        size = _SIZES[second << 8 | third]
        side = _side_information(second, self.channels)
        head = bytes([0xFF, second, third, self.header[3]])
        return (head + bytes(side) + b"Xing" + struct.pack(">II", 1, frames)).ljust(size, b"\0")


def _needed_frame(offsets: np.ndarray, begin: int) -> int:
    """The frame with which decoding must begin, so that frame `begin` is decoded as in the complete file."""
    needed, reserved = max(0, begin - _WARM_UP), 0
    while needed > 0 and reserved < _RESERVOIR:
        needed -= 1
        reserved += max(0, int(offsets[needed + 1] - offsets[needed]) - _FRAME_OVERHEAD)
    return needed


def _side_information(second: int, channels: int) -> int:
    """Bytes of side information in a frame of layer III, by its header's second byte."""
    if second >> 3 & 3 == 3:
        return 17 if channels == 1 else 32
    return 9 if channels == 1 else 17


def find_frames(content: bytes) -> Mp3 | None:
    """Find all frames of an mp3 file.

    Returns:
        None if they cannot be found from their headers: the bit rate is free, or the file is another one.

    Raises:
        ContainerFault: the file ends in the middle of a frame or has fewer frames than its header announces,
            frames are damaged, or the sample rate or the number of channels changes.
    """
    position = _first_frame(content, 0)
    if position is None:
        return None
    header = content[position : position + 4]
    parts = []
    while position is not None:
        if not _same_format(content[position : position + 4], header):
            raise ContainerFault(
                "changes its sample rate or number of channels: write it again as one stream"
            )
        offsets = _run_of_frames(content, position, header)
        parts += _split_at_headers(content, offsets, Mp3((), header))
        position = _after_tags(content, offsets[-1])
    return Mp3(tuple(parts), header)


def _same_format(header: bytes, other: bytes) -> bool:
    """Whether version, layer, sample rate and number of channels are the same."""
    return (
        (header[1] ^ other[1]) & 0xFE == 0
        and (header[2] ^ other[2]) & 0x0C == 0
        and (header[3] >> 6 == 3) == (other[3] >> 6 == 3)
    )


def _run_of_frames(content: bytes, position: int, header: bytes) -> list[int]:
    """The offsets of frames that follow each other, and the end of the last one."""
    sizes, length = _SIZES, len(content) - 4
    version, channels = header[1] & 0xFE, header[3] >> 6 == 3
    offsets = [position]
    while position <= length and content[position] == 0xFF:
        second = content[position + 1]
        size = sizes[second << 8 | content[position + 2]]
        if not size or second & 0xFE != version or (content[position + 3] >> 6 == 3) != channels:
            break
        position += size
        if position > length + 4:
            raise ContainerFault(TRUNCATED)
        offsets.append(position)
    return offsets


def _first_frame(content: bytes, start: int) -> int | None:
    """Where the first frame at or after `start` begins, which another one or the end of the file follows."""
    for match in re.finditer(rb"\xff[\xe0-\xff]", content[start:]):
        position = start + match.start()
        size = (
            _SIZES[int.from_bytes(content[position + 1 : position + 3])]
            if position + 4 <= len(content)
            else 0
        )
        after = content[position + size : position + size + 4]
        if size and len(after) == 4 and _same_format(content[position : position + 4], after):
            return position
        if size and position + size == len(content):
            return position
    return None


def _after_tags(content: bytes, position: int) -> int | None:
    """Where frames go on after the tags of music players; None at the end of the file.

    Raises:
        ContainerFault: something other than a tag or zeros is between two frames, or much of it at the end.
    """
    while True:
        rest = content[position : position + 32]
        if rest.startswith(b"TAG"):
            position += 128
        elif rest.startswith(b"ID3") and len(rest) >= 10:
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
            break
    if position >= len(content):
        return None
    following = _first_frame(content, position)
    if following is not None and following > position:
        raise ContainerFault(f"is damaged: {following - position} bytes between two frames are not audio")
    if following is None and len(content) - position > _MAX_JUNK:
        raise ContainerFault(f"is damaged: the last {len(content) - position} bytes are not audio")
    return following


def _split_at_headers(content: bytes, offsets: list[int], file: Mp3) -> Iterator[_Part]:
    """Divide a run of frames at those with an encoder's header: each begins another recording."""
    side = _side_information(file.header[1], file.channels)
    marks = []
    for number, offset in enumerate(offsets[:-1]):
        # A header is in a frame of silence, whose side information is zero; mpg123 recognises it likewise.
        tag = offset + 4 + side
        if content[tag : tag + 4] in (b"Xing", b"Info") and not any(content[offset + 6 : tag]):
            marks.append((number, tag))
    if not marks or marks[0][0] > 0:
        end = marks[0][0] if marks else len(offsets) - 1
        yield _Part(np.array(offsets[: end + 1], np.int64))
    for (number, tag), (end, _) in zip(marks, [*marks[1:], (len(offsets) - 1, 0)], strict=True):
        yield _part_with_header(content, tag, np.array(offsets[number + 1 : end + 1], np.int64), file)


def _part_with_header(content: bytes, tag: int, offsets: np.ndarray, file: Mp3) -> _Part:
    """The frames after an encoder's header, of which `tag` is the offset in bytes."""
    flags, announced = struct.unpack(">II", content[tag + 4 : tag + 12].ljust(8, b"\0"))
    frames = len(offsets) - 1
    if flags & 1 and announced > frames + _COUNT_TOLERANCE:
        raise ContainerFault(TRUNCATED)
    lame = tag + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    if not content[lame : lame + 1].strip(b"\0"):
        return _Part(offsets)
    values = int.from_bytes(content[lame + 21 : lame + 24])
    delay, padding = (values >> 12) + _DECODER_DELAY, (values & 0xFFF) - _DECODER_DELAY
    # If frames follow those that the header counts, then its padding is not at the end.
    known = not flags & 1 or announced + _COUNT_TOLERANCE >= frames
    return _Part(offsets, delay, max(0, padding) if known else 0)
