"""Recognises the format of an audio file and opens it, even if it was joined from several files."""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from slam_asr.audio.containers import ContainerFault, check_length, joined_ogg
from slam_asr.audio.faults import CHANGED_TEXT, AudioError, Fault, StructureError, more_than_announced
from slam_asr.audio.flac import joined_flac
from slam_asr.audio.media import open_media
from slam_asr.audio.media_lengths import kind_of
from slam_asr.audio.mp3 import Mp3, Part, find_frames, may_be_mp3
from slam_asr.audio.sound import Sound, joined

_NOT_AUDIO = "cannot be read as wav, flac, ogg, opus, mp3, m4a, webm or another usual audio format"
_MIN_SAMPLE_RATE = 4000
"""Hz. A header with a lower rate is damaged, and resampling from that rate would exhaust memory."""
_SAMPLE_BYTES = {
    **dict.fromkeys(("PCM_S8", "PCM_U8", "ULAW", "ALAW"), 1),
    **{"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8},
}
"""Bytes of a sample, by libsndfile's name of the encoding. Compressed encodings are missing."""
_NO_LENGTH = 2**62
"""Number of samples from which on the length counts as unknown. libsndfile reports its maximum, 2**63 - 1, if
a header has no length, and for an Ogg file that was cut off
(https://github.com/libsndfile/libsndfile/issues/989)."""
_BLOCK = 2**22
"""Samples of all channels together that are decoded at once: 17 MB."""


class _Content(io.BytesIO):
    """The bytes of a file. libsndfile seeks to positions before their start if the header is damaged."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Seek as in a file. If that fails, seek to the start."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            # soundfile calls this method from C, which would print an exception's traceback and ignore it.
            return super().seek(0)


@contextlib.contextmanager
def open_sound(file: Path | bytes, path: str | os.PathLike) -> Iterator[Sound]:
    """Open an audio file, after comparing the length that its header announces with what it holds.

    Args:
        file: the file, or its bytes.
        path: the file's name in messages.

    Raises:
        StructureError: the file holds less or more than its header announces, is damaged in its structure,
            or is encrypted.
        AudioError: the file is empty or not audio, its header has no length or too low a sample rate, or its
            sample rate or number of channels changes.
        ConfigurationError: the file needs PyAV, and that is not installed.
    """
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = (
            _Content(file) if isinstance(file, bytes) else stack.enter_context(open(file, "rb"))
        )
        if stream.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{path} is empty (0 bytes).", Fault.EMPTY)
        try:
            announced = check_length(stream)
            sounds = _opened(stream, file, path, stack)
            if announced is not None and len(sounds) == 1 and sounds[0].sample_bytes:
                _limit_frames(sounds[0], announced)
        except ContainerFault as fault:
            raise StructureError(f"{path} {fault}.") from fault
        except (soundfile.LibsndfileError, TypeError) as error:
            # libsndfile's message is not quoted: it is global to all threads and may be about another file.
            raise AudioError(f"{path} {_NOT_AUDIO}.") from error
        first = sounds[0]
        if first.frames >= _NO_LENGTH:
            raise AudioError(
                f"{path} has no length in its header, as when written to a pipe: write it again as a file."
            )
        if first.sample_rate < _MIN_SAMPLE_RATE:
            raise AudioError(f"{path} has a sample rate of {first.sample_rate} Hz: its header is damaged.")
        if len({(sound.sample_rate, sound.channels) for sound in sounds}) > 1:
            raise AudioError(f"{path} {CHANGED_TEXT}.")
        yield first if len(sounds) == 1 else joined(sounds)


def _limit_frames(sound: Sound, announced: int) -> None:
    """Limit a file to the samples that its header announces; `announced` is their size in bytes.

    In some formats, libsndfile reads everything after the header as samples, even the tags of music players.

    Raises:
        ContainerFault: another number in the header says that there are fewer samples.
    """
    frames = announced // (sound.sample_bytes * sound.channels)
    if sound.frames < frames:
        raise ContainerFault(more_than_announced(f"{frames} samples instead of {sound.frames}"))
    sound.frames = frames


def _opened(
    stream: BinaryIO, file: Path | bytes, path: str | os.PathLike, stack: contextlib.ExitStack
) -> list[Sound]:
    """Open the file, or each of the files that were joined in it. `stack` closes them."""
    stream.seek(0)
    head = stream.read(16)
    if kind := kind_of(head):
        return [open_media(stream, kind, path)]
    if may_be_mp3(head[:4]) and (mp3 := _found(find_frames, file)):
        return [_part_of_mp3(mp3, part, stream, file) for part in mp3.parts]
    stream.seek(0)
    try:
        # libsndfile reads a file by its name faster than it reads a Python stream. The name is passed as
        # bytes, because soundfile cannot encode a str with a name that is not UTF-8.
        source = stream if isinstance(file, bytes) else os.fsencode(file)
        sound = stack.enter_context(soundfile.SoundFile(source))
    except soundfile.LibsndfileError:
        if head.startswith(b"caff"):  # libsndfile reads CAF with plain samples, but only some with ALAC
            return [open_media(stream, "caf", path)]
        raise
    find_joined = _JOINED.get(sound.format)
    offsets = _found(find_joined, file) if find_joined else []
    if len(offsets) < 2:
        return [_single(sound)]
    parts = []
    for start, end in offsets:
        stream.seek(start)
        part = _Content(stream.read(end - start))
        parts.append(_single(stack.enter_context(soundfile.SoundFile(part))))
    return parts


def _part_of_mp3(mp3: Mp3, part: Part, stream: BinaryIO, file: Path | bytes) -> Sound:
    frames = mp3.samples_of(part)

    def read(first: int, count: int) -> Iterator[np.ndarray]:
        # If libsndfile opens a complete mp3 by its name, it needs only two thirds of the time.
        if mp3.is_plain and first == 0 and count == frames and not isinstance(file, bytes):
            with soundfile.SoundFile(os.fsencode(file)) as sound:
                if sound.frames == count:
                    yield sound.read(count, dtype="float32", always_2d=True)
                    return
        if count:
            yield mp3.read(part, stream, first, count)

    return Sound(frames, mp3.sample_rate, mp3.channels, read)


_JOINED = {"FLAC": joined_flac, "OGG": joined_ogg}
"""The function that finds the files that were joined in one, by libsndfile's name of the format."""


def _found(find: Callable[[bytes], Any], file: Path | bytes) -> Any:
    """Return what `find` finds in a file. A file with many segments is searched once for all of them."""
    if isinstance(file, bytes):
        return find(file)
    status = file.stat()
    return _found_in(str(file), find, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _found_in(file: str, find: Callable[[bytes], Any], size: int, modified_ns: int) -> Any:
    """Search a file. `size` (bytes) and `modified_ns` are cache keys: a changed file is searched again."""
    return find(Path(file).read_bytes())


def _single(sound: soundfile.SoundFile) -> Sound:
    read = functools.partial(_read, sound)
    width = _SAMPLE_BYTES.get(sound.subtype, 0)
    return Sound(sound.frames, sound.samplerate, sound.channels, read, width, sound.format == "MP3")


def _read(sound: soundfile.SoundFile, first: int, count: int) -> Iterator[np.ndarray]:
    if first:
        sound.seek(first)
    # Read in blocks, because half an hour of silence in many channels is a small file but many gigabytes of
    # samples.
    longest = max(1, _BLOCK // sound.channels)
    while count > 0:
        block = sound.read(min(longest, count), dtype="float32", always_2d=True)
        # The file ends earlier than its header announces. The caller compares the numbers of samples.
        if len(block) == 0:
            return
        yield block
        count -= len(block)
