"""FLAC: finds the files that were joined in one, and files that hold more samples than they announce.

The layout of header and frames is that of RFC 9639.
"""

from itertools import pairwise

from slam_asr.audio.containers import ContainerFault
from slam_asr.audio.faults import more_than_announced


def joined_flac(content: bytes) -> list[tuple[int, int]]:
    """Return the offsets in bytes of the start and end of each FLAC file that was joined in `content`.

    Raises:
        ContainerFault: a file holds more samples than its header announces.
    """
    starts, position = [], content.find(b"fLaC")
    while position >= 0:
        # STREAMINFO is always the first block of metadata, and has 34 bytes.
        if content[position + 4 : position + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            starts.append(position)
        position = content.find(b"fLaC", position + 4)
    parts = list(pairwise([*starts, len(content)]))
    for start, end in parts:
        announced, held = _lengths(content, start, end)
        if announced and held is not None and held > announced:
            raise ContainerFault(more_than_announced(f"{held} samples instead of {announced}"))
    return parts


_BLOCK_SIZES = {
    1: 192,
    **{i: 576 << (i - 2) for i in range(2, 6)},
    **{i: 256 << (i - 8) for i in range(8, 16)},
}
"""Samples per frame, by the code in the frame's header (RFC 9639, section 9.1.1)."""
_TAIL_BYTES = 2**15
"""Bytes at the end of a file that are searched for its last frame."""


def _lengths(content: bytes, start: int, end: int) -> tuple[int, int | None]:
    """Return the number of samples that a FLAC header announces, and the number up to the last frame's end.

    The second number is None if no last frame is found.
    """
    # STREAMINFO follows the marker `fLaC` and a block's header, 4 bytes each. It begins with the smallest
    # block size (16 bits), and has the number of samples (36 bits) before the final MD5 (RFC 9639, 8.2).
    info = content[start + 8 : start + 42]
    if len(info) < 34:
        return 0, None
    block = int.from_bytes(info[:2])
    announced = int.from_bytes(info[13:18]) & 0xF_FFFF_FFFF
    if content[end - 128 : end - 125] == b"TAG":  # an ID3v1 tag
        end -= 128
    tail = content[max(start + 42, end - _TAIL_BYTES) : end]
    limit = len(tail)
    # A frame begins with a sync code of 15 bits; the 16th bit is 1 if blocks vary in size.
    while (position := max(tail.rfind(b"\xff\xf8", 0, limit), tail.rfind(b"\xff\xf9", 0, limit))) >= 0:
        held = _frame_end(tail[position : position + 16], block)
        # Compressed samples may look like the header of a frame, but then the checksum of the frame is wrong.
        # The checksum takes milliseconds, so it is computed only if the frame contradicts the file's header.
        if held == announced or (held is not None and _crc16(tail[position:]) == 0):
            return announced, held
        limit = position + 1
    return announced, None


def _frame_end(head: bytes, block: int) -> int | None:
    """Return the number of samples up to the end of a frame; None if `head` is not the header of a frame.

    The layout of the header is in RFC 9639, section 9.1.

    Args:
        head: the first bytes of the frame.
        block: samples per frame, if the stream has a fixed block size.
    """
    if len(head) < 6:
        return None
    code = head[2] >> 4
    # The number of the frame or sample is coded as in UTF-8, in 1 to 7 bytes. The leading ones of the first
    # byte give the number of bytes (none means a single byte), and each further byte begins with the bits 10.
    count = 8 - (~head[4] & 0xFF).bit_length() if head[4] >= 0xC0 else int(head[4] < 0x80)
    if not code or not count or count > 7 or len(head) < 4 + count:
        return None
    number = head[4] if count == 1 else head[4] & (0x7F >> count)
    for byte in head[5 : 4 + count]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 0x3F
    # With code 6 or 7, the block size minus 1 follows in 1 or 2 bytes.
    after = 4 + count
    samples = _BLOCK_SIZES.get(code) or int.from_bytes(head[after : after + code - 5]) + 1
    # With fixed block sizes the number counts frames, otherwise samples.
    return (number if head[1] & 1 else number * block) + samples


def _crc16_of(byte: int) -> int:
    value = byte << 8
    for _ in range(8):
        value = value << 1 ^ 0x18005 if value & 0x8000 else value << 1
    return value


_CRC16 = [_crc16_of(byte) for byte in range(256)]


def _crc16(frame: bytes) -> int:
    """Return the CRC-16 of a FLAC frame with its own checksum, which is 0 if it is intact (RFC 9639, 9.3)."""
    value = 0
    for byte in frame:
        value = (value << 8 & 0xFFFF) ^ _CRC16[value >> 8 ^ byte]
    return value
