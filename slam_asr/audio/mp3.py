"""Exact access to mp3: finds and counts every frame, and decodes any stretch by itself.

The length that libsndfile reports for an mp3 is not reliable. It is the count in the first Xing header, even
if more streams follow; without such a header, it is an estimate from the bit rate. libsndfile's seeking is
not exact either. But the header of every frame gives the size of the frame, so all frames of a file are found
in milliseconds. A stretch is decoded from copies of its frames and of the frames before it that it depends
on. The samples are then equal to those of the complete file, except for the last bit of the decoder's sums.

The data of a layer III frame may begin in the unused space of the frames before it, the bit reservoir. The
first field of the frame's side information, main_data_begin, is the number of these bytes.
"""

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import soundfile

from slam_asr.audio.containers import ContainerFault, end_of_tags
from slam_asr.audio.faults import CHANGED_TEXT, TRUNCATED_TEXT

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
"""Samples by which every mp3 decoder lags. LAME's tag does not include them, and mpg123 drops them."""
_RESERVOIR = 511
"""Bytes of earlier frames that a frame of MPEG 1 may use; a frame of MPEG 2 may use half as many."""
_FRAME_OVERHEAD = 38
"""Maximum bytes of a frame that the reservoir cannot use: header, checksum and side information."""
_WARM_UP = 3
"""Frames after which the state of the decoder (overlap and filter bank) no longer depends on its start."""
_COUNT_TOLERANCE = 2
"""Frames by which the count of a Xing header may differ: some encoders count the header's own frame."""
_MAX_JUNK = 4096
"""Bytes before the first frame and after the last one that are ignored, besides tags."""


def _frame_sizes() -> list[int]:
    """Return the size of a frame in bytes, by the second and third byte of its header; 0 if not valid."""
    sizes = [0] * 2**16
    # The sync word is the first byte, 0xFF, and the first three bits of the second, also ones. Frames have
    # 384 samples in layer I, 576 in layer III of MPEG 2, and 1152 otherwise. The factors are samples per
    # frame / 8 bits per byte; layer I counts in slots of 4 bytes.
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
class Part:
    """A run of frames that one encoder wrote."""

    offsets: np.ndarray
    """int64 [frames + 1]: the offset of each frame in the file, in bytes, and the end of the last one."""
    delay: int = 0
    """Samples at the start that are not part of the recording, including `_DECODER_DELAY`; 0 if unknown."""
    padding: int = 0
    """Samples at the end that are not part of the recording."""


@dataclass(frozen=True)
class Mp3:
    """The places of the frames in an mp3 file, and the number of samples in them."""

    parts: tuple[Part, ...]
    header: bytes
    """The first frame's header, 4 bytes."""

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return _RATES[self.header[1] >> 3 & 3][self.header[2] >> 2 & 3]

    @property
    def is_mpeg1(self) -> bool:
        return self.header[1] >> 3 & 3 == 3

    @property
    def channels(self) -> int:
        return 1 if self.header[3] >> 6 == 3 else 2

    @property
    def samples_per_frame(self) -> int:
        return 1152 if self.is_mpeg1 else 576

    def samples_of(self, part: Part) -> int:
        """Return the number of samples in a part, per channel."""
        return max(0, (len(part.offsets) - 1) * self.samples_per_frame - part.delay - part.padding)

    @property
    def is_plain(self) -> bool:
        """Whether the file is one recording with LAME's tag: libsndfile then knows its length."""
        return len(self.parts) == 1 and self.parts[0].delay > 0

    def read(self, part: Part, stream: BinaryIO, first: int, count: int) -> np.ndarray:
        """Decode a stretch of a part.

        Args:
            part: one of `parts`.
            stream: the file.
            first: number of the part's first sample to decode, from 0.
            count: number of samples.

        Returns:
            float32 [samples, channels]; fewer samples if a frame is damaged.
        """
        first += part.delay
        size = self.samples_per_frame
        end = min(-(-(first + count) // size), len(part.offsets) - 1)
        # Frames from `exact` on are decoded as in the complete file. The frames from `begin` to `exact` only
        # fill the reservoir.
        exact = max(0, first // size - _WARM_UP)
        begin = _first_needed(part.offsets, exact)
        stream.seek(int(part.offsets[begin]))
        content = bytearray(stream.read(int(part.offsets[end] - part.offsets[begin])))
        # mpg123 drops the decoder's delay from the first frame. A frame of silence is put first, so that the
        # frames of the file lose nothing.
        lead = self._silent_frame(1, b"")
        self._silence(content, (part.offsets[begin : exact + 1] - part.offsets[begin]).tolist(), len(lead))
        counting = self._silent_frame(13, b"Xing" + struct.pack(">II", 1, end - begin + 1))
        # The decoder gives the frame of silence without the delay, then the frames from `begin` on.
        skipped = size - _DECODER_DELAY + first - begin * size
        with soundfile.SoundFile(io.BytesIO(counting + lead + content)) as sound:
            # A single read: soundfile seeks after each one, and mpg123's seek is not exact.
            return sound.read(skipped + count, dtype="float32", always_2d=True)[skipped:]

    def _silence(self, content: bytearray, offsets: list[int], lead: int) -> None:
        """Turn the frames that are needed only for the reservoir into silence. Their data remain.

        Otherwise mpg123 would decode them too, and complain on standard error that they refer to data in
        frames that are not in `content`.

        Args:
            content: consecutive frames, which are changed.
            offsets: where the frames to change begin, and where the last of them ends.
            lead: size in bytes of the frame before them.
        """
        side, reservoir = self.side_information, _RESERVOIR if self.is_mpeg1 else _RESERVOIR // 2
        reserved = lead - 4 - side
        for start, end in pairwise(offsets):
            start += 4 if content[start + 1] & 1 else 6  # a checksum takes two bytes
            # mpg123 passes on only the part of the reservoir that a frame uses, so each frame claims to use
            # all of it. Zeros after main_data_begin (9 bits in MPEG 1, 8 in MPEG 2) mean no sound.
            used = min(reserved, reservoir)
            begin = used << 7 if self.is_mpeg1 else used << 8
            content[start : start + side] = begin.to_bytes(2).ljust(side, b"\0")
            reserved = used + end - start - side

    @property
    def side_information(self) -> int:
        """Bytes of side information in a frame of layer III."""
        if self.is_mpeg1:
            return 17 if self.channels == 1 else 32
        return 9 if self.channels == 1 else 17

    def _silent_frame(self, bit_rate: int, content: bytes) -> bytes:
        """Make a frame of silence, with `content` after its side information.

        If the content is a Xing header, libsndfile takes the number of frames from it, and mpg123 gives no
        samples for the frame. Without the header, libsndfile would estimate the length from the bit rate, and
        omit the samples beyond it. `bit_rate` is the index of a bit rate, from 1. With index 13, a Xing
        header fits into the frame at every sample rate.
        """
        second = self.header[1] | 1  # no checksum
        third = bit_rate << 4 | self.header[2] & 0x0C
        head = bytes([0xFF, second, third, self.header[3]]) + bytes(self.side_information)
        return (head + content).ljust(_SIZES[second << 8 | third], b"\0")


def _first_needed(offsets: np.ndarray, exact: int) -> int:
    """Return the number of the first frame that is needed to fill the reservoir of frame `exact`."""
    first, reserved = exact, 0
    while first > 0 and reserved < _RESERVOIR:
        first -= 1
        reserved += max(0, int(offsets[first + 1] - offsets[first]) - _FRAME_OVERHEAD)
    return first


def may_be_mp3(head: bytes) -> bool:
    """Return whether a file that begins with these 4 bytes may be an mp3: with a frame or an ID3 tag."""
    return head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")


def find_frames(content: bytes) -> Mp3 | None:
    """Find all frames of an mp3 file.

    Returns:
        The frames; None if no frame of layer III is found, or if its bit rate is free and its size unknown.

    Raises:
        ContainerFault: the file ends in the middle of a frame or has fewer frames than its header announces,
            frames are damaged, or the sample rate or the number of channels changes.
    """
    tags_end = end_of_tags(content, 0)
    position = _first_frame(content[: tags_end + _MAX_JUNK], tags_end)
    if position is None:
        return None
    header = content[position : position + 4]
    if header[1] >> 1 & 3 != 1:  # not layer III
        return None
    parts: list[Part] = []
    while position is not None:
        if not _same_format(content[position : position + 4], header):
            raise ContainerFault(CHANGED_TEXT)
        offsets = _run_of_frames(content, position, header)
        position = _after_tags(content, offsets[-1])
        parts += _split_at_headers(content, offsets, Mp3((), header))
    return Mp3(tuple(parts), header)


def _same_format(header: bytes, other: bytes) -> bool:
    """Return whether two headers of 4 bytes have the same version, layer, sample rate and channels."""
    return (
        (header[1] ^ other[1]) & 0xFE == 0  # all but the bit for a checksum
        and (header[2] ^ other[2]) & 0x0C == 0
        and (header[3] >> 6 == 3) == (other[3] >> 6 == 3)  # 3 is mono, the others have two channels
    )


def _run_of_frames(content: bytes, position: int, header: bytes) -> list[int]:
    """Return the offsets of successive frames, and the end of the last one."""
    sizes, last_header = _SIZES, len(content) - 4
    version, channels = header[1] & 0xFE, header[3] >> 6 == 3
    offsets = [position]
    while position <= last_header and content[position] == 0xFF:
        second = content[position + 1]
        size = sizes[second << 8 | content[position + 2]]
        if not size or second & 0xFE != version or (content[position + 3] >> 6 == 3) != channels:
            break
        position += size
        if position > len(content):
            raise ContainerFault(TRUNCATED_TEXT)
        offsets.append(position)
    return offsets


def _first_frame(content: bytes, start: int) -> int | None:
    """Return the offset of the first frame at or after `start`; None if no frame is found.

    Other data may look like a frame's header, so another frame or the end of the file must follow.
    """
    for match in re.finditer(rb"\xff[\xe0-\xff](?=..)", content[start:], re.DOTALL):
        position = start + match.start()
        size = _SIZES[int.from_bytes(content[position + 1 : position + 3])]
        header, after = content[position : position + 4], content[position + size : position + size + 4]
        is_followed = len(after) == 4 and _same_format(header, after)
        if size and (is_followed or position + size == len(content)):
            return position
    return None


def _after_tags(content: bytes, position: int) -> int | None:
    """Return the offset of the next frame after the tags at `position`; None at the end of the file.

    Raises:
        ContainerFault: bytes other than tags and zeros are between two frames, or too many at the end.
    """
    position = end_of_tags(content, position)
    following = _first_frame(content, position)
    if following is not None and following > position:
        raise ContainerFault(f"is damaged: {following - position} bytes between two frames are not audio")
    if following is None and len(content) - position > _MAX_JUNK:
        raise ContainerFault(f"is damaged: the last {len(content) - position} bytes are not audio")
    return following


def _split_at_headers(content: bytes, offsets: list[int], file: Mp3) -> Iterator[Part]:
    """Divide a run of frames at the frames with an encoder's header, each of which begins a recording."""
    side = file.side_information
    marks = []
    for number, offset in enumerate(offsets[:-1]):
        # A header is in a frame of silence, whose side information is zero. mpg123 uses the same rule.
        # Two bytes are skipped, because they may be a checksum.
        tag = offset + 4 + side
        if content[tag : tag + 4] in (b"Xing", b"Info") and not any(content[offset + 6 : tag]):
            marks.append((number, tag))
    ends = [number for number, _ in marks] + [len(offsets) - 1]
    if ends[0] > 0:
        yield Part(np.array(offsets[: ends[0] + 1], np.int64))
    for (number, tag), end in zip(marks, ends[1:], strict=True):
        yield _part_with_header(content, tag, np.array(offsets[number + 1 : end + 1], np.int64), file)


def _part_with_header(content: bytes, tag: int, offsets: np.ndarray, file: Mp3) -> Part:
    """Return the frames after an encoder's header, whose offset in bytes is `tag`."""
    # `Xing` or `Info`, flags, and then the fields that the flags announce: the number of frames (4 bytes), of
    # bytes (4), a table of positions for seeking (100), and the quality (4).
    flags, announced = struct.unpack(">II", content[tag + 4 : tag + 12].ljust(8, b"\0"))
    frames = len(offsets) - 1
    if flags & 1 and announced > frames + _COUNT_TOLERANCE:
        raise ContainerFault(TRUNCATED_TEXT)
    lame = tag + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    # LAME's tag may follow. It begins with the encoder's name, and has delay and padding in 12 bits each.
    if not content[lame : lame + 1].strip(b"\0"):
        return Part(offsets)
    values = int.from_bytes(content[lame + 21 : lame + 24])
    delay, padding = (values >> 12) + _DECODER_DELAY, (values & 0xFFF) - _DECODER_DELAY
    # If frames follow those that the header counts, then its padding is not at the end.
    known = not flags & 1 or announced + _COUNT_TOLERANCE >= frames
    return Part(offsets, delay, max(0, padding) if known else 0)
