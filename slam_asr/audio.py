"""Waveforms: every file that libsndfile reads, as 16-kHz mono with full scale at 1.

A damaged file is refused here rather than trained on: libsndfile itself is content with a wav or an
Ogg file that was cut off, and gives what is left of it. Files may lie in object storage, and an
utterance may be a segment of one.
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
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import soundfile
import soxr

from slam_asr.errors import UserError
from slam_asr.storage import (
    exists,
    fetch,
    is_s3,
    local_path,
    open_stream,
    read_bytes,
    sha256_of_bytes,
    sha256_of_file,
)

if TYPE_CHECKING:
    from slam_asr.manifest import Utterance

SAMPLE_RATE = 16_000
"""Hz: what every encoder here was trained on."""

MISSING = "missing audio"
UNREADABLE = "unreadable audio"
EMPTY = "empty audio"
NOT_FINITE = "non-finite samples"
TOO_LONG = "too long"
BEYOND = "segment beyond the file's end"

_LOWEST_RATE = 4000
"""Hz; a header that says less is damaged, and resampling from it would fill the memory."""
_MP3_SHORTFALL = 0.05
"""An mp3 without a Xing header has its length only estimated, from the bit rate of its first frames."""
_OGG_PAGE = 65_307
"""Bytes of the largest Ogg page (RFC 3533, section 6)."""
OVERSHOOT = 0.5
"""Seconds that a segment may reach beyond its file's end, and is cut there: Kaldi's extract-segments allows as much."""
_PIPED = 0x7FFF_F000
"""A wav written to a pipe claims about 2 or 4 GiB, since its length was not known when its header was."""


class AudioError(UserError):
    """An audio file that cannot be used; `reason` is the kind of fault, to count by."""

    def __init__(self, sentence: str, reason: str = UNREADABLE) -> None:
        super().__init__(sentence)
        self.reason = reason


def audio_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of an audio file's bytes, on local disk or in object storage.

    Raises:
        AudioError: the file is missing.
    """
    if not is_s3(path):
        return _sha256_of_local(_present(path))
    with _missing_told(path), open_stream(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class Clip:
    """A decoded file."""

    samples: np.ndarray
    """float32 [samples], 16 kHz."""
    sample_rate: int
    """Of the file, in Hz."""
    channels: int
    """Of the file; `samples` is their mean."""
    sha256: str | None = None
    """Of the file's bytes, where all of them were in memory."""

    @property
    def duration(self) -> float:
        """Seconds. A multiple of 1/16000, so `round(duration * SAMPLE_RATE)` is the number of samples."""
        return len(self.samples) / SAMPLE_RATE


def load_audio(path: str | os.PathLike) -> np.ndarray:
    """The waveform of a wav, flac, ogg, opus or mp3 file: float32 [samples], 16 kHz, mono.

    Raises:
        AudioError: the file is missing, damaged or empty, or holds samples that are no numbers.
    """
    return read_clip(path).samples


def load_utterance(utterance: "Utterance") -> np.ndarray:
    """What an utterance's manifest names: float32 [samples], 16 kHz, mono.

    The file is read once. Of a segment's file the digest is computed once for all its segments.

    Raises:
        UserError: the file is not the one that the manifest was built from.
        AudioError: it is missing, damaged or empty, or too short for the segment.
    """
    path = utterance.source
    if utterance.start is None:
        content = _content(path)
        sha256 = sha256_of_bytes(content) if utterance.sha256 else None
        file: Path | bytes = content
    else:
        file = _segments_file(path)
        sha256 = _sha256_of_local(file) if utterance.sha256 else None
    if sha256 != utterance.sha256:
        raise UserError(
            f"{path} was changed since its manifest was built: run `slam-asr build-manifest` again."
        )
    return _clip(file, path, utterance.start, utterance.duration).samples


def read_clip(
    path: str | os.PathLike,
    longest: float | None = None,
    start: float | None = None,
    duration: float | None = None,
    content: bytes | None = None,
) -> Clip:
    """A file's waveform, or a segment's, with what the file was before it became 16-kHz mono.

    Args:
        path: the audio file.
        longest: seconds; what the header announces (or the segment asks for) beyond that is refused
            before it fills the memory.
        start: seconds into the file at which a segment begins; nothing before it is decoded where the
            format can be entered anywhere.
        duration: seconds of the segment; to the file's end if not given.
        content: the file's bytes, where they are at hand; `path` is its name for people then.

    Raises:
        AudioError: as for `load_audio`, or longer than `longest`, or a segment that the file does not hold.
    """
    if content is not None:
        file: Path | bytes = content
    elif is_s3(path) and start is None:
        file = _content(path)
    else:
        file = _segments_file(path)
    clip = _clip(file, path, start, duration, longest)
    clip.sha256 = sha256_of_bytes(file) if isinstance(file, bytes) else None
    return clip


def count_samples(path: str | os.PathLike) -> int:
    """Samples at 16 kHz that a file's header announces.

    Raises:
        AudioError: the file is missing or no audio.
    """
    file = _content(path) if is_s3(path) else _present(path)
    try:
        header = soundfile.info(io.BytesIO(file) if isinstance(file, bytes) else os.fsencode(file))
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    return round(header.frames * SAMPLE_RATE / header.samplerate)


def _present(path: str | os.PathLike) -> Path:
    file = local_path(path)
    if not file.is_file():
        raise _missing(path)
    return file


def _missing(path: str | os.PathLike) -> AudioError:
    return AudioError(
        f"There is no audio file {path}: build the manifest again where the corpus lies now.", MISSING
    )


@contextlib.contextmanager
def _missing_told(path: str | os.PathLike) -> Iterator[None]:
    """Tell an object that is not there from one that cannot be reached."""
    try:
        yield
    except UserError as error:
        if exists(path):
            raise
        raise _missing(path) from error


def _content(path: str | os.PathLike) -> bytes:
    """All bytes of an audio file."""
    if not is_s3(path):
        return _present(path).read_bytes()
    with _missing_told(path):
        return read_bytes(path)


def _segments_file(path: str | os.PathLike) -> Path:
    """A file with many segments, on local disk: an object is fetched once for all of them."""
    if not is_s3(path):
        return _present(path)
    with _missing_told(path):
        return fetch(path)


def _sha256_of_local(file: Path) -> str:
    status = file.stat()
    return _sha256_of_known(str(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256_of_known(file: str, size: int, changed: int) -> str:
    return sha256_of_file(file)


def _clip(
    file: Path | bytes,
    path: str | os.PathLike,
    start: float | None,
    duration: float | None,
    longest: float | None = None,
) -> Clip:
    """Decode a file, or the bytes of one; `path` is its name for people."""
    with contextlib.closing(io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")) as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{path} has no bytes in it.", EMPTY)
        if _is_cut_off(stream):
            raise AudioError(f"{path} ends too early: it was cut off when it was written or copied.")
        stream.seek(0)
        # libsndfile reads a file by its name faster than through Python; soundfile takes any name as bytes only.
        opened = stream if isinstance(file, bytes) else os.fsencode(file)
        samples, sample_rate = _decode(opened, path, start, duration, longest)
    channels = samples.shape[1]
    mono = samples.mean(axis=1, dtype=np.float32) if channels > 1 else samples[:, 0]
    if not np.isfinite(mono).all():
        raise AudioError(f"{path} holds samples that are not finite (NaN or infinite).", NOT_FINITE)
    if sample_rate != SAMPLE_RATE:
        mono = soxr.resample(mono, sample_rate, SAMPLE_RATE, quality="HQ")
    if len(mono) == 0:
        raise AudioError(f"{path} holds no samples.", EMPTY)
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), sample_rate, channels)


def _decode(
    file: bytes | BinaryIO,
    path: str | os.PathLike,
    start: float | None,
    duration: float | None,
    longest: float | None,
) -> tuple[np.ndarray, int]:
    """All samples of a file (its name, or a stream) as float32 [samples, channels], or a segment's, and its sample rate."""
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        # libsndfile keeps the cause of a failed opening in one place for all threads: it may be another file's.
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    with sound:
        announced, sample_rate = sound.frames, sound.samplerate
        if announced >= 2**62:
            raise AudioError(
                f"{path} does not say how long it is, as when written to a pipe: write it anew as a file."
            )
        if sample_rate < _LOWEST_RATE:
            raise AudioError(f"{path} has a sample rate of {sample_rate} Hz: its header is damaged.")
        first, wanted = (0, announced) if start is None else _segment(sound, path, start, duration)
        if longest is not None and wanted / sample_rate > longest:
            raise AudioError(
                f"{_what(path, start)} lasts {wanted / sample_rate:.2f} s, longer than {longest:g} s.",
                TOO_LONG,
            )
        compressed = sound.format in ("MP3", "MPEG")
        # Entered in the middle, an mp3 gives other samples than from its start.
        skipped = first if compressed else 0
        try:
            if first > skipped:
                sound.seek(first)
            samples = sound.read(skipped + wanted, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError, ValueError) as error:
            raise AudioError(f"{path} is damaged: it cannot be decoded to its end.") from error
    allowed = _MP3_SHORTFALL * announced if compressed else 0
    if skipped + wanted - len(samples) > allowed:
        raise AudioError(
            f"{path} is damaged: it holds {first - skipped + len(samples)} of the {announced} samples that it announces."
        )
    return samples[skipped:], sample_rate


def _segment(
    sound: soundfile.SoundFile, path: str | os.PathLike, start: float, duration: float | None
) -> tuple[int, int]:
    """First sample of a segment, and how many it has, at the file's rate."""
    rate, frames = sound.samplerate, sound.frames
    first = round(start * rate)
    wanted = frames - first if duration is None else round(duration * rate)
    if first >= frames or first + wanted > frames + OVERSHOOT * rate:
        end = "its end" if duration is None else f"{start + duration:.2f} s"
        raise AudioError(
            f"{path} lasts {frames / rate:.2f} s, and a segment goes from {start:.2f} s to {end}.", BEYOND
        )
    return first, min(wanted, frames - first)


def _what(path: str | os.PathLike, start: float | None) -> str:
    return f"{path}" if start is None else f"A segment of {path}, at {start:.2f} s,"


def _is_cut_off(stream: BinaryIO) -> bool:
    """Whether a wav file is shorter than its header says, or an Ogg file lacks its last page."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        while len(chunk := stream.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"data":
                return length < _PIPED and stream.tell() + length > size
            stream.seek(length + length % 2, os.SEEK_CUR)
    if head[:4] == b"OggS":
        stream.seek(max(0, size - _OGG_PAGE))
        return not _ends_with_last_page(stream.read())
    return False


def _ends_with_last_page(tail: bytes) -> bool:
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 0x04:  # byte 5 holds the flags, 0x04 is "end of stream"
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
