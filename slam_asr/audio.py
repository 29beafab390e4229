"""Waveforms: every file that libsndfile reads, as 16-kHz mono with full scale at 1.

A damaged file is refused here rather than trained on: libsndfile itself is content with a wav or an
Ogg file that was cut off, and gives what is left of it.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from slam_asr.errors import UserError
from slam_asr.storage import local_path, sha256_of_file

SAMPLE_RATE = 16_000
"""Hz: what every encoder here was trained on."""

MISSING = "missing audio"
UNREADABLE = "unreadable audio"
EMPTY = "empty audio"
NOT_FINITE = "non-finite samples"
TOO_LONG = "too long"

_LOWEST_RATE = 4000
"""Hz; a header that says less is damaged, and resampling from it would fill the memory."""
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
    file = local_path(path)
    if not file.is_file():
        raise AudioError(f"There is no audio file {path}: build the manifest again where the corpus lies now.", MISSING)
    return sha256_of_file(file)


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


def load_audio(path: str | os.PathLike) -> np.ndarray:
    """The waveform of a wav, flac, ogg, opus or mp3 file: float32 [samples], 16 kHz, mono.

    Raises:
        AudioError: the file is missing, damaged or empty, or holds samples that are no numbers.
    """
    return read_clip(path).samples


def read_clip(path: str | os.PathLike, longest: float | None = None) -> Clip:
    """A file's waveform, with what the file was before it became 16-kHz mono.

    Args:
        path: the audio file.
        longest: seconds; a file whose header announces more is refused before it fills the memory.

    Raises:
        AudioError: as for `load_audio`, or longer than `longest`.
    """
    file = local_path(path)
    if not file.is_file():
        raise AudioError(f"There is no audio file {path}.", MISSING)
    if file.stat().st_size == 0:
        raise AudioError(f"{path} has no bytes in it.", EMPTY)
    if _is_cut_off(file):
        raise AudioError(f"{path} ends too early: it was cut off when it was written or copied.")
    samples, sample_rate = _decode(file, path, longest)
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
    file = local_path(path)
    if not file.is_file():
        raise AudioError(f"There is no audio file {path}.", MISSING)
    try:
        header = soundfile.info(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    return round(header.frames * SAMPLE_RATE / header.samplerate)


def _decode(file: Path, path: str | os.PathLike, longest: float | None) -> tuple[np.ndarray, int]:
    """All samples as float32 [samples, channels], and the file's sample rate."""
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:
        # libsndfile keeps the cause of a failed opening in one place for all threads: it may be another file's.
        raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
    with sound:
        announced, sample_rate = sound.frames, sound.samplerate
        if announced >= 2**62:
            raise AudioError(f"{path} does not say how long it is, as when written to a pipe: write it anew as a file.")
        if sample_rate < _LOWEST_RATE:
            raise AudioError(f"{path} has a sample rate of {sample_rate} Hz: its header is damaged.")
        if longest is not None and announced / sample_rate > longest:
            raise AudioError(f"{path} lasts {announced / sample_rate:.2f} s, longer than {longest:g} s.", TOO_LONG)
        try:
            samples = sound.read(dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError, ValueError) as error:
            raise AudioError(f"{path} is damaged: it cannot be decoded to its end.") from error
        allowed = _MP3_SHORTFALL * announced if sound.format in ("MP3", "MPEG") else 0
        if announced - len(samples) > allowed:
            raise AudioError(
                f"{path} is damaged: it holds {len(samples)} of the {announced} samples that it announces."
            )
    return samples, sample_rate


def _is_cut_off(file: Path) -> bool:
    """Whether a wav file is shorter than its header says, or an Ogg file lacks its last page."""
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
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
