"""Audio decoding: any file that libsndfile reads becomes float32 mono samples at 16 kHz, in [-1, 1].

Truncated and damaged files raise `AudioError`, so that no model is trained on them. libsndfile alone does not
detect that a wav or Ogg file is truncated, and returns the samples that remain. Files may be in object
storage, and an utterance may be a segment of a file.
"""

import contextlib
import functools
import hashlib
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from slam_asr.errors import InputError, UserError
from slam_asr.storage import exists, fetch, is_s3, open_stream, read_bytes, sha256_of_bytes, sha256_of_file

SAMPLE_RATE = 16_000
"""Hz. Every supported encoder was trained at this rate."""

MISSING = "missing audio"
UNREADABLE = "unreadable audio"
EMPTY = "empty audio"
NOT_FINITE = "non-finite samples"
TOO_LONG = "too long"
BEYOND_END = "segment beyond the file's end"

_MIN_SAMPLE_RATE = 4000
"""Hz. A header with a lower rate is damaged, and resampling from that rate would exhaust memory."""
_MP3_SHORTFALL = 0.05
"""Fraction of an mp3's announced samples that may be missing. Without a Xing header, libsndfile estimates the
length from the bit rate of the first frames."""
_OGG_PAGE = 65_307
"""Size of the largest Ogg page in bytes (RFC 3533, section 6)."""
_MAX_OVERSHOOT = 0.5
"""Seconds by which a segment may exceed its file, as in Kaldi's extract-segments; it is cut at the file's
end."""
_PIPE_LENGTH = 0x7FFF_F000
"""Bytes. A wav written to a pipe announces about 2 or 4 GiB, because its length was unknown when the header
was written."""


class AudioError(InputError):
    """An audio file that cannot be used. `reason` is the kind of fault, for statistics."""

    def __init__(self, sentence: str, reason: str = UNREADABLE) -> None:
        super().__init__(sentence)
        self.reason = reason


def audio_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of an audio file's bytes, on local disk or in object storage, as 64 hexadecimal digits.

    Raises:
        AudioError: the file is missing.
    """
    if not is_s3(path):
        return _sha256_of_local(_local_copy(path))
    with _missing_as_audio_error(path), open_stream(path) as stream:
        # typeshed asks for `readinto`, which BinaryIO does not declare and every stream here has.
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


@dataclass
class Clip:
    """The samples of a file or segment, and the properties of its file."""

    samples: np.ndarray
    """float32 [samples], mono at 16 kHz."""
    sample_rate: int
    """The file's own rate in Hz, before resampling."""
    channels: int
    """Channels of the file; `samples` is their mean."""
    sha256: str | None = None
    """SHA-256 of the file's bytes; None if the file was not read into memory completely."""

    @property
    def duration(self) -> float:
        """Seconds, a multiple of 1/16000: `round(duration * SAMPLE_RATE)` is the number of samples."""
        return len(self.samples) / SAMPLE_RATE


def load_audio(path: str | os.PathLike) -> np.ndarray:
    """Decode a wav, flac, ogg, opus or mp3 file.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        AudioError: the file is missing, damaged or empty, or has NaN or infinite samples.
    """
    return read_clip(path).samples


def load_checked(
    path: str | os.PathLike,
    sha256: str | None,
    start: float | None = None,
    duration: float | None = None,
) -> np.ndarray:
    """Decode a file or a segment, after a check that the file is the one that its manifest was built from.

    A complete file is read only once for both the check and the decoding. A file with many segments is hashed
    once for all of them.

    Args:
        path: the audio file.
        sha256: the file's expected SHA-256, or None for no check.
        start: where the segment begins, in seconds; None for the complete file.
        duration: length of the segment in seconds; None if it ends with the file.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        InputError: the file has another SHA-256.
        AudioError: the file is missing, damaged or empty, or too short for the segment.
    """
    if start is None:
        content = _content(path)
        found = sha256_of_bytes(content) if sha256 else None
        file: Path | bytes = content
    else:
        file = _local_copy(path)
        found = _sha256_of_local(file) if sha256 else None
    if found != sha256:
        raise InputError(
            f"{path} was changed since its manifest was built: run `slam-asr build-manifest` again."
        )
    return _clip(file, path, start, duration).samples


def read_clip(
    path: str | os.PathLike,
    max_duration: float | None = None,
    start: float | None = None,
    duration: float | None = None,
    content: bytes | None = None,
) -> Clip:
    """Decode a file or a segment, and return its samples with the file's own sample rate and channels.

    Args:
        path: the audio file.
        max_duration: limit in seconds on the length that the header announces, or on the segment's length.
            Longer audio raises before it is decoded into memory.
        start: where the segment begins in the file, in seconds. Nothing before it is decoded, unless the
            format has no exact seek (mp3).
        duration: length of the segment in seconds; None if it ends with the file.
        content: the file's bytes, if they are already in memory; `path` is then only its name in messages.

    Raises:
        AudioError: as for `load_audio`; also if the audio is longer than `max_duration`, or the segment
            exceeds the file.
    """
    file: Path | bytes | None = content
    if file is None:
        file = _content(path) if is_s3(path) and start is None else _local_copy(path)
    clip = _clip(file, path, start, duration, max_duration)
    clip.sha256 = sha256_of_bytes(file) if isinstance(file, bytes) else None
    return clip


def count_samples(path: str | os.PathLike) -> int:
    """The number of samples, after resampling to 16 kHz, that a file's header announces; nothing is decoded.

    Raises:
        AudioError: the file is missing or is not audio.
    """
    file = _content(path) if is_s3(path) else _local_copy(path)
    try:
        header = soundfile.info(io.BytesIO(file) if isinstance(file, bytes) else os.fsencode(file))
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    return round(header.frames * SAMPLE_RATE / header.samplerate)


@contextlib.contextmanager
def _missing_as_audio_error(path: str | os.PathLike) -> Iterator[None]:
    """Raise `AudioError` for a missing file or object; leave other errors of disk and store unchanged."""
    try:
        yield
    except (UserError, OSError) as error:
        if exists(path):
            raise
        raise AudioError(
            f"There is no audio file {path}: "
            "check the path, or build the manifest again if the corpus moved.",
            MISSING,
        ) from error


def _content(path: str | os.PathLike) -> bytes:
    """All bytes of an audio file."""
    with _missing_as_audio_error(path):
        return read_bytes(path)


def _local_copy(path: str | os.PathLike) -> Path:
    """The audio file on local disk. An object is cached, so many segments of it need one download."""
    with _missing_as_audio_error(path):
        file = fetch(path)
        if not file.is_file():
            raise FileNotFoundError(file)
        return file


def _sha256_of_local(file: Path) -> str:
    status = file.stat()
    return _cached_sha256(str(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _cached_sha256(file: str, size: int, modified_ns: int) -> str:
    """Hash a file; `size` (bytes) and `modified_ns` only make the cache miss when the file has changed."""
    return sha256_of_file(file)


def _clip(
    file: Path | bytes,
    path: str | os.PathLike,
    start: float | None,
    duration: float | None,
    max_duration: float | None = None,
) -> Clip:
    """Decode a file, or the bytes of one; `path` is its name in messages. All times are in seconds."""
    with contextlib.closing(io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")) as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{path} is empty (0 bytes).", EMPTY)
        if _is_truncated(stream):
            raise AudioError(f"{path} ends too early: it was truncated when it was written or copied.")
        stream.seek(0)
        # libsndfile reads a file by its name faster than it reads a Python stream. The name is passed as
        # bytes, because soundfile cannot encode a str with a name that is not UTF-8.
        name_or_stream = stream if isinstance(file, bytes) else os.fsencode(file)
        samples, sample_rate = _decode(name_or_stream, path, start, duration, max_duration)
    channels = samples.shape[1]
    mono = samples.mean(axis=1, dtype=np.float32) if channels > 1 else samples[:, 0]
    if not np.isfinite(mono).all():
        raise AudioError(f"{path} has samples that are not finite (NaN or infinite).", NOT_FINITE)
    if sample_rate != SAMPLE_RATE:
        mono = soxr.resample(mono, sample_rate, SAMPLE_RATE, quality="HQ")
    if len(mono) == 0:
        raise AudioError(f"{path} has no samples.", EMPTY)
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), sample_rate, channels)


def _decode(
    file: bytes | BinaryIO,
    path: str | os.PathLike,
    start: float | None,
    duration: float | None,
    max_duration: float | None,
) -> tuple[np.ndarray, int]:
    """Decode a file, given by its name or as a stream, or a segment of it; see `read_clip`.

    Returns:
        Samples as float32 [samples, channels], and their rate in Hz, both at the file's own rate.
    """
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        # Do not quote libsndfile's message: it is global to all threads and may be about another file.
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    with sound:
        announced, sample_rate = sound.frames, sound.samplerate
        # libsndfile reports its maximum, 2**63 - 1, where a header has no length.
        if announced >= 2**62:
            raise AudioError(
                f"{path} has no length in its header, as when written to a pipe: write it again as a file."
            )
        if sample_rate < _MIN_SAMPLE_RATE:
            raise AudioError(f"{path} has a sample rate of {sample_rate} Hz: its header is damaged.")
        first, count = (0, announced) if start is None else _segment(sound, path, start, duration)
        if max_duration is not None and count / sample_rate > max_duration:
            what = f"{path}" if start is None else f"A segment of {path}, at {start:.2f} s,"
            raise AudioError(
                f"{what} lasts {count / sample_rate:.2f} s, longer than {max_duration:g} s.", TOO_LONG
            )
        is_mp3 = sound.format in ("MP3", "MPEG")
        # After a seek, an mp3 does not decode to the same samples, because a frame may use bits of earlier
        # ones: decode it from its start, and discard the samples before the segment.
        discarded = first if is_mp3 else 0
        try:
            if first > discarded:
                sound.seek(first)
            samples = sound.read(discarded + count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError, ValueError) as error:
            raise AudioError(f"{path} is damaged: it cannot be decoded to its end.") from error
    allowed = _MP3_SHORTFALL * announced if is_mp3 else 0
    if discarded + count - len(samples) > allowed:
        decoded = first - discarded + len(samples)
        raise AudioError(
            f"{path} is damaged: its header announces {announced} samples, but only {decoded} can be decoded."
        )
    return samples[discarded:], sample_rate


def _segment(
    sound: soundfile.SoundFile, path: str | os.PathLike, start: float, duration: float | None
) -> tuple[int, int]:
    """The first sample of a segment (from 0) and its number of samples, both at the file's own rate."""
    rate, available = sound.samplerate, sound.frames
    first = round(start * rate)
    count = available - first if duration is None else round(duration * rate)
    if first >= available or first + count > available + _MAX_OVERSHOOT * rate:
        end = "its end" if duration is None else f"{start + duration:.2f} s"
        raise AudioError(
            f"{path} lasts {available / rate:.2f} s, but a segment ranges from {start:.2f} s to {end}.",
            BEYOND_END,
        )
    return first, min(count, available - first)


def _is_truncated(stream: BinaryIO) -> bool:
    """Whether a wav file is shorter than its header announces, or an Ogg file lacks its last page."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        while len(chunk := stream.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                return length < _PIPE_LENGTH and stream.tell() + length > size
            stream.seek(length + length % 2, os.SEEK_CUR)  # RIFF pads chunks to an even length
    if head[:4] == b"OggS":
        stream.seek(max(0, size - _OGG_PAGE))
        return not _ends_with_last_page(stream.read())
    return False


def _ends_with_last_page(tail: bytes) -> bool:
    """Whether the last Ogg page in `tail` is complete and is marked as the last (RFC 3533, section 6).

    A page has a header of 27 bytes, whose last byte is the number of segments; then, for each segment, a byte
    with its size; then the segments.
    """
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 0x04:  # byte 5 holds the flags, 0x04 is "end of stream"
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
