"""Waveforms: every file that libsndfile reads, as 16-kHz mono with full scale at 1.

A damaged file is refused here rather than trained on: libsndfile itself is content with a wav or an
Ogg file that was cut off, and gives what is left of it.
"""

import functools
import io
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from slam_asr.errors import UserError
from slam_asr.manifest import Utterance
from slam_asr.storage import info, is_s3, local_path, read_bytes, sha256_of_bytes, sha256_of_file

SAMPLE_RATE = 16_000
"""Hz: what every encoder here was trained on."""

MISSING = "missing audio"
UNREADABLE = "unreadable audio"
EMPTY = "empty audio"
NOT_FINITE = "non-finite samples"
TOO_LONG = "too long"
SHORT_FILE = "stretch beyond the file's end"

_LOWEST_RATE = 4000
"""Hz; a header that says less is damaged, and resampling from it would fill the memory."""
_ROUNDING = 0.02
"""Seconds by which a stretch may end behind the file: tables give times in hundredths."""
_MP3_SHORTFALL = 0.05
"""An mp3 without a Xing header has its length only estimated, from the bit rate of its first frames."""
_OGG_PAGE = 65_307
"""Bytes of the largest Ogg page (RFC 3533, section 6)."""
_PIPED = 0x7FFF_F000
"""A wav written to a pipe claims about 2 or 4 GiB, since its length was not known when its header was."""


class AudioError(UserError):
    """An audio file that cannot be used; `reason` is the kind of fault, to count by."""

    def __init__(self, sentence: str, reason: str = UNREADABLE) -> None:
        super().__init__(sentence)
        self.reason = reason


def audio_sha256(path: str) -> str:
    """The SHA-256 of an audio file's bytes.

    Raises:
        AudioError: the file is missing.
    """
    if is_s3(path):
        return sha256_of_bytes(_object(path))
    file = local_path(path)
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None or not file.is_file():
        raise AudioError(f"There is no audio file {path}: build the manifest again where the corpus lies now.", MISSING)
    return _sha256_once(str(file), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_once(path: str, size: int, changed: int) -> str:
    """Of a file that may hold many utterances, one after the other."""
    return sha256_of_file(path)


def _object(path: str) -> bytes:
    """An audio file in object storage."""
    if info(path) is None:
        raise AudioError(f"There is no audio file {path}: build the manifest again where the corpus lies now.", MISSING)
    return read_bytes(path)


@dataclass
class Clip:
    """A decoded file."""

    samples: np.ndarray
    """float32 [samples], 16 kHz."""
    sample_rate: int
    """Of the file, in Hz."""
    channels: int
    """Of the file; `samples` is their mean."""

    @property
    def duration(self) -> float:
        """Seconds. A multiple of 1/16000, so `round(duration * SAMPLE_RATE)` is the number of samples."""
        return len(self.samples) / SAMPLE_RATE


def load_utterance(utterance: Utterance) -> np.ndarray:
    """The waveform of an utterance, a whole file or a stretch of one: float32 [samples], 16 kHz, mono.

    Raises:
        UserError: the file is not the one that the manifest was built from.
        AudioError: as for `read_clip`.
    """
    source = utterance.source
    content = _object(source) if is_s3(source) else None
    if utterance.sha256 is not None:
        there = audio_sha256(source) if content is None else sha256_of_bytes(content)
        if there != utterance.sha256:
            raise UserError(f"{source} was changed since its manifest was built: run `slam-asr build-manifest` again.")
    return read_clip(source, start=utterance.start, duration=utterance.duration, content=content).samples


def load_audio(path: str | os.PathLike) -> np.ndarray:
    """The waveform of a wav, flac, ogg, opus or mp3 file: float32 [samples], 16 kHz, mono.

    Raises:
        AudioError: the file is missing, damaged or empty, or holds samples that are no numbers.
    """
    return read_clip(path).samples


def read_clip(
    path: str | os.PathLike, longest: float | None = None, start: float | None = None, duration: float | None = None,
    content: bytes | None = None,
) -> Clip:
    """A file's waveform, with what the file was before it became 16-kHz mono.

    Args:
        path: the audio file, local or s3://.
        longest: seconds; audio that is announced as longer is refused before it fills the memory.
        start: seconds into the file at which a stretch of it begins; the whole file if not given.
        duration: seconds of that stretch.
        content: the file's bytes, where they are at hand.

    Raises:
        AudioError: as for `load_audio`, or longer than `longest`, or a stretch that the file does not have.
    """
    if content is None and is_s3(path):
        content = _object(os.fspath(path))
    if content is None:
        file = local_path(path)
        if not file.is_file():
            raise AudioError(f"There is no audio file {path}.", MISSING)
        stream: BinaryIO = open(file, "rb")  # noqa: SIM115 - closed below
    else:
        stream = io.BytesIO(content)
    with stream:
        if stream.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{path} has no bytes in it.", EMPTY)
        if _is_cut_off(stream):
            raise AudioError(f"{path} ends too early: it was cut off when it was written or copied.")
        stream.seek(0)
        # libsndfile reads a file by itself much faster than through Python.
        samples, sample_rate = _decode(stream if content is not None else local_path(path), path, longest, start, duration)
    channels = samples.shape[1]
    mono = samples.mean(axis=1, dtype=np.float32) if channels > 1 else samples[:, 0]
    if not np.isfinite(mono).all():
        raise AudioError(f"{path} holds samples that are not finite (NaN or infinite).", NOT_FINITE)
    if sample_rate != SAMPLE_RATE:
        mono = soxr.resample(mono, sample_rate, SAMPLE_RATE, quality="HQ")
    if len(mono) == 0:
        raise AudioError(f"{path} holds no samples.", EMPTY)
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), sample_rate, channels)


def count_samples(path: str | os.PathLike) -> int:
    """Samples at 16 kHz that a file's header announces.

    Raises:
        AudioError: the file is missing or no audio.
    """
    if is_s3(path):
        source: object = io.BytesIO(_object(os.fspath(path)))
    else:
        source = local_path(path)
        if not source.is_file():
            raise AudioError(f"There is no audio file {path}.", MISSING)
    try:
        header = soundfile.info(source)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    return round(header.frames * SAMPLE_RATE / header.samplerate)


def _decode(
    source: object, path: str | os.PathLike, longest: float | None, start: float | None, duration: float | None
) -> tuple[np.ndarray, int]:
    """Samples as float32 [samples, channels], all or those of a stretch, and the file's sample rate."""
    try:
        sound = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError) as error:
        # libsndfile keeps the cause of a failed opening in one place for all threads: it may be another file's.
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    with sound:
        announced, sample_rate = sound.frames, sound.samplerate
        if announced >= 2**62:
            raise AudioError(f"{path} does not say how long it is, as when written to a pipe: write it anew as a file.")
        if sample_rate < _LOWEST_RATE:
            raise AudioError(f"{path} has a sample rate of {sample_rate} Hz: its header is damaged.")
        lasts = announced / sample_rate if start is None else duration
        if longest is not None and lasts > longest:
            raise AudioError(f"{path} lasts {lasts:.2f} s, longer than {longest:g} s.", TOO_LONG)
        try:
            if start is not None:
                return _stretch(sound, path, start, duration), sample_rate
            samples = sound.read(dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError, ValueError) as error:
            raise AudioError(f"{path} is damaged: it cannot be decoded to its end.") from error
        allowed = _MP3_SHORTFALL * announced if sound.format in ("MP3", "MPEG") else 0
        if announced - len(samples) > allowed:
            raise AudioError(
                f"{path} is damaged: it holds {len(samples)} of the {announced} samples that it announces."
            )
    return samples, sample_rate


def _stretch(sound: soundfile.SoundFile, path: str | os.PathLike, start: float, duration: float) -> np.ndarray:
    """[samples, channels] of a stretch of a file; it may end a rounding error behind the file's end."""
    begin, count = round(start * sound.samplerate), round(duration * sound.samplerate)
    missing = begin + count - sound.frames
    if missing > _ROUNDING * sound.samplerate:
        lasts = sound.frames / sound.samplerate
        raise AudioError(f"{path} lasts {lasts:.2f} s, and an utterance of it is to end at {start + duration:.2f} s.", SHORT_FILE)
    sound.seek(begin)
    samples = sound.read(count - max(0, missing), dtype="float32", always_2d=True)
    if len(samples) < count - max(0, missing):
        raise AudioError(f"{path} is damaged: it cannot be decoded from {start:.2f} s for {duration:.2f} s.")
    return samples


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
