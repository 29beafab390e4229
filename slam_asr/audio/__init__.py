"""Audio decoding: a file of any usual format becomes float32 mono samples at 16 kHz, with full scale 1.

Every sample that a file holds is decoded, even if the file was joined from several. Truncated and damaged
files, and files that hold more than their header announces, raise `AudioError`, so that no model is trained
on them. libsndfile and ffmpeg alone do not notice such files (see `containers`, `flac`, `mp3` and
`media_lengths`).
Files may be in object storage, and an utterance may be a segment of a file that libsndfile reads.
"""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from slam_asr.audio.containers import ContainerFault
from slam_asr.audio.faults import AudioError, Fault, StructureError
from slam_asr.audio.formats import open_sound
from slam_asr.audio.media_lengths import kind_of
from slam_asr.audio.mixdown import SAMPLE_RATE, Mixdown
from slam_asr.audio.sound import ESTIMATE_ERROR, Sound
from slam_asr.errors import InputError, UserError
from slam_asr.storage import exists, fetch, is_s3, open_stream, read_bytes, sha256_of_bytes, sha256_of_file

_MAX_OVERSHOOT = 0.5
"""Seconds by which a segment may exceed its file, as in Kaldi's extract-segments; it is cut at the file's
end."""


def audio_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of an audio file's bytes, on local disk or in object storage, in hexadecimal.

    Raises:
        AudioError: the file is missing.
    """
    if not is_s3(path):
        return _sha256_of(_local_copy(path))
    with _missing_as_audio_error(path), open_stream(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class Clip:
    """The samples of a file or segment, and the properties of its file."""

    samples: np.ndarray
    """float32 [samples], mono at 16 kHz."""
    sample_rate: int
    """The file's own rate in Hz, before resampling."""
    channels: int
    """Number of channels in the file; `samples` is their mean, unless one of them was requested."""
    sha256: str | None = None
    """SHA-256 of the file's bytes; None if the file was not read into memory completely."""
    silent: bool = False
    """Whether all samples have the same value, as from a muted microphone."""
    cancelled: bool = False
    """Whether the channels cancel each other in `samples`, because one is the inverse of another."""

    @property
    def duration(self) -> float:
        """Seconds, as a multiple of 1/16000: `round(duration * SAMPLE_RATE)` is the number of samples."""
        return len(self.samples) / SAMPLE_RATE


def load_audio(path: str | os.PathLike) -> np.ndarray:
    """Decode an audio file, or the first audio track of a video.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        AudioError: the file is missing, damaged or empty, or holds less or more than its header announces;
            its samples are NaN, infinite or far above full scale; or its channels cancel each other.
        ConfigurationError: the file needs PyAV, and that is not installed.
    """
    return read_clip(path).samples


def load_checked(
    path: str | os.PathLike,
    sha256: str | None,
    start: float | None = None,
    duration: float | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """Decode a file or a segment, after checking that the file is unchanged since its manifest was built.

    A complete file is read only once, for both the check and the decoding. A file with many segments is
    hashed once for all of them.

    Args:
        path: the audio file.
        sha256: the file's expected SHA-256, or None for no check.
        start: where the segment begins, in seconds; None for the complete file.
        duration: length of the segment in seconds; None if it ends with the file.
        channel: number of the channel to use, counted from 0; None for the mean of all.

    Returns:
        float32 [samples], mono at 16 kHz.

    Raises:
        InputError: the file has another SHA-256.
        AudioError: the file is missing, damaged or empty, lacks the channel, or is too short for the segment;
            its format allows no segments; or its samples are NaN, infinite or far above full scale.
        ConfigurationError: as for `load_audio`.
    """
    file = _content(path) if start is None else _local_copy(path)
    if sha256 is not None and _sha256_of(file) != sha256:
        raise InputError(
            f"{path} was changed since its manifest was built: run `slam-asr build-manifest` again."
        )
    return _clip(file, path, start, duration, channel).samples


def read_clip(
    path: str | os.PathLike,
    max_duration: float | None = None,
    start: float | None = None,
    duration: float | None = None,
    content: bytes | None = None,
    channel: int | None = None,
    channel_of_several: bool = False,
) -> Clip:
    """Decode a file or a segment, and return its samples with the file's own sample rate and channels.

    Args:
        path: the audio file.
        max_duration: maximum announced length of the file, or of the segment, in seconds. Longer audio is
            refused before it is decoded.
        start: where the segment begins in the file, in seconds. Nothing before it is decoded.
        duration: length of the segment in seconds; None if it ends with the file.
        content: the file's bytes, if they are already in memory; `path` is then used only in messages.
        channel: number of the channel to use, counted from 0; None for the mean of all.
        channel_of_several: whether `channel` is ignored if the file has only one channel.

    Raises:
        AudioError: as for `load_audio`; also if the audio is longer than `max_duration`, the segment exceeds
            the file, the file's format allows no segments, or the file lacks the channel.
        ConfigurationError: as for `load_audio`.
    """
    file: Path | bytes | None = content
    if file is None:
        # A complete object is read into memory. For segments, it is copied to disk, so that one copy is
        # enough for all segments.
        file = _content(path) if is_s3(path) and start is None else _local_copy(path)
    clip = _clip(file, path, start, duration, channel, max_duration, channel_of_several)
    if clip.cancelled:
        raise AudioError(
            f"The {clip.channels} channels of {path} cancel each other when they are mixed, because one is "
            "the inverse of another: write one of them to a file of its own.",
            Fault.CANCELLED,
        )
    clip.sha256 = sha256_of_bytes(file) if isinstance(file, bytes) else None
    return clip


def count_samples(path: str | os.PathLike) -> int:
    """Count a file's samples, as after resampling to 16 kHz.

    A file that only ffmpeg reads is decoded, because its header announces no exact length. If a file holds
    less or more than its header announces, the result is the number of samples that libsndfile reports,
    or 0 if only ffmpeg reads the file. Such damage is reported when the file is read.

    Raises:
        AudioError: the file is missing or is not audio.
        ConfigurationError: the file needs PyAV, and that is not installed.
    """
    file = _content(path) if is_s3(path) else _local_copy(path)
    try:
        with open_sound(file, path) as sound:
            frames = sound.frames
            if not sound.has_segments:
                frames = sum(len(block) for block in sound.read(0, frames))
            return round(frames * SAMPLE_RATE / sound.sample_rate)
    except ContainerFault:
        return 0
    except StructureError:
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
            if kind_of(stream.read(16)):
                return 0
        try:
            header = soundfile.info(io.BytesIO(file) if isinstance(file, bytes) else os.fsencode(file))
        except (soundfile.LibsndfileError, TypeError):
            return 0  # only ffmpeg reads the file, such as AAC in CAF
        # The formula is the same as above, so that a later message about the damage names the same length.
        return round(header.frames * SAMPLE_RATE / header.samplerate)


@contextlib.contextmanager
def _missing_as_audio_error(path: str | os.PathLike) -> Iterator[None]:
    """Raise `AudioError` for a missing file or object; leave other errors of disk and store unchanged."""
    try:
        yield
    except (UserError, OSError) as error:
        # Checked only after a failure, because a check in advance would need a request for every object.
        if exists(path):
            raise
        raise AudioError(
            f"There is no audio file {path}: "
            "check the path, or build the manifest again if the corpus moved.",
            Fault.MISSING,
        ) from error


def _content(path: str | os.PathLike) -> bytes:
    """Read all bytes of an audio file."""
    with _missing_as_audio_error(path):
        return read_bytes(path)


def _local_copy(path: str | os.PathLike) -> Path:
    """Return the audio file on local disk. An object is cached, so its segments need only one download."""
    with _missing_as_audio_error(path):
        file = fetch(path)
        if not file.is_file():
            raise FileNotFoundError(file)
        return file


def _sha256_of(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return sha256_of_bytes(file)
    status = file.stat()
    return _cached_sha256(str(file), status.st_size, status.st_mtime_ns)


# Segments of one file are usually read one after another. A cache of 1024 files is also enough for shuffled
# segments of many files.
@functools.lru_cache(maxsize=1024)
def _cached_sha256(file: str, size: int, modified_ns: int) -> str:
    """Hash a file. `size` (bytes) and `modified_ns` are only cache keys: a changed file is hashed again."""
    return sha256_of_file(file)


def _clip(
    file: Path | bytes,
    path: str | os.PathLike,
    start: float | None,
    duration: float | None,
    channel: int | None,
    max_duration: float | None = None,
    channel_of_several: bool = False,
) -> Clip:
    """Decode a file, or the bytes of one; `path` is used only in messages. All times are in seconds."""
    with open_sound(file, path) as sound:
        sample_rate, channels = sound.sample_rate, sound.channels
        if channel_of_several and channels == 1:
            channel = None
        if channel is not None and channel >= channels:
            raise AudioError(
                f"{path} has {channels} channel{'s' * (channels > 1)}, but the corpus or manifest names "
                f"channel {channel}, counted from 0: correct that.",
                Fault.NO_CHANNEL,
            )
        if start is not None and not sound.has_segments:
            raise AudioError(
                f"{path} has a format in which no segment can be read without decoding everything before it: "
                "convert it to flac, and name that file.",
                Fault.NO_SEGMENTS,
            )
        first, count = (0, sound.frames) if start is None else _segment(sound, path, start, duration)
        # The announced length is checked before anything is decoded, because an hour of audio takes 230 MB at
        # 16 kHz, and more at its own rate.
        if max_duration is not None and count / sample_rate > max_duration:
            what = f"{path}" if start is None else f"A segment of {path}, at {start:.2f} s,"
            raise AudioError(
                f"{what} lasts {count / sample_rate:.2f} s, longer than {max_duration:g} s.", Fault.TOO_LONG
            )
        mixdown = Mixdown(path, sample_rate, channel)
        try:
            for block in sound.read(first, count):
                mixdown.add(block)
        except (soundfile.LibsndfileError, MemoryError, ValueError) as error:
            raise AudioError(f"{path} is damaged: it cannot be decoded to its end.") from error
        except ContainerFault as fault:
            raise StructureError(f"{path} {fault}.") from fault
    if mixdown.count < count - (ESTIMATE_ERROR * sound.frames if sound.estimated else 0):
        raise AudioError(
            f"{path} is damaged: it should have {first + count} samples, but only {first + mixdown.count} "
            "can be decoded."
        )
    samples = mixdown.finish()
    if len(samples) == 0:
        raise AudioError(f"{path} has no samples.", Fault.EMPTY)
    return Clip(samples, sample_rate, channels, silent=mixdown.silent, cancelled=mixdown.cancelled)


def _segment(sound: Sound, path: str | os.PathLike, start: float, duration: float | None) -> tuple[int, int]:
    """Return the first sample of a segment (from 0) and its number of samples, at the file's own rate."""
    rate, available = sound.sample_rate, sound.frames
    first = round(start * rate)
    count = available - first if duration is None else round(duration * rate)
    # Compared at the file's own rate: after resampling, rounding could move the end by a sample.
    if first >= available or first + count > available + _MAX_OVERSHOOT * rate:
        end = "its end" if duration is None else f"{start + duration:.2f} s"
        raise AudioError(
            f"{path} lasts {available / rate:.2f} s, but a segment ranges from {start:.2f} s to {end}.",
            Fault.BEYOND_END,
        )
    return first, min(count, available - first)
