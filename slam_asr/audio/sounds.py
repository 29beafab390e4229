"""An audio file as one sequence of samples, whatever its format, and also if it was joined from several."""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from slam_asr.audio.containers import ContainerFault, check_length, joined_flac, joined_ogg
from slam_asr.audio.faults import EMPTY, AudioError
from slam_asr.audio.mp3 import Mp3, find_frames

_MIN_SAMPLE_RATE = 4000
"""Hz. A header with a lower rate is damaged, and resampling from that rate would exhaust memory."""
_BLOCK = 2**18
"""Samples decoded at once. Memory is taken for what a file holds, not for what its header announces."""
_NO_LENGTH = 2**62
"""libsndfile reports its maximum, 2**63 - 1, where a header has no length."""
_Layout = Mp3 | list[tuple[int, int]]
"""The frames of an mp3, or where each of several joined files begins and ends in bytes."""


@dataclass
class Sound:
    """An open audio file."""

    frames: int
    """Samples per channel."""
    sample_rate: int
    """Hz."""
    channels: int
    blocks: Callable[[int, int], Iterator[np.ndarray]]
    """Decodes `count` samples from the sample `first` (from 0), as blocks of float32 [samples, channels]. They
    are fewer if the file is damaged."""


@contextlib.contextmanager
def open_sound(file: Path | bytes, path: str | os.PathLike) -> Iterator[Sound]:
    """Open an audio file, after comparing the length that its header announces with what it holds.

    Args:
        file: the file, or its bytes.
        path: its name in messages.

    Raises:
        AudioError: the file is empty, cannot be read as audio, or holds less or more than its header announces.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb"))
        if stream.seek(0, os.SEEK_END) == 0:
            raise AudioError(f"{path} is empty (0 bytes).", EMPTY)
        try:
            check_length(stream)
            sounds = _opened(stream, file, stack)
        except ContainerFault as fault:
            raise AudioError(f"{path} {fault}.") from fault
        except (soundfile.LibsndfileError, TypeError) as error:
            # Do not quote libsndfile's message: it is global to all threads and may be about another file.
            raise AudioError(f"{path} cannot be read as wav, flac, ogg, opus or mp3.") from error
        first = sounds[0]
        if first.frames >= _NO_LENGTH:
            raise AudioError(
                f"{path} has no length in its header, as when written to a pipe: write it again as a file."
            )
        if first.sample_rate < _MIN_SAMPLE_RATE:
            raise AudioError(f"{path} has a sample rate of {first.sample_rate} Hz: its header is damaged.")
        if any((s.sample_rate, s.channels) != (first.sample_rate, first.channels) for s in sounds):
            raise AudioError(
                f"{path} changes its sample rate or number of channels: write it again as one stream."
            )
        yield first if len(sounds) == 1 else _joined(sounds)


def _opened(stream: BinaryIO, file: Path | bytes, stack: contextlib.ExitStack) -> list[Sound]:
    """Open the file, or each of the files that were joined in it; `stack` closes them."""
    stream.seek(0)
    # libsndfile reads a file by its name faster than it reads a Python stream. The name is passed as bytes,
    # because soundfile cannot encode a str with a name that is not UTF-8.
    sound = stack.enter_context(soundfile.SoundFile(stream if isinstance(file, bytes) else os.fsencode(file)))
    if isinstance(file, bytes):
        layout = _layout(file, sound.format)
    else:
        status = file.stat()
        layout = _cached_layout(str(file), sound.format, status.st_size, status.st_mtime_ns)
    if isinstance(layout, Mp3):
        return [
            Sound(
                layout.frames, layout.sample_rate, layout.channels, functools.partial(layout.blocks, stream)
            )
        ]
    if len(layout) < 2:
        return [_single(sound)]
    parts = []
    for start, end in layout:
        stream.seek(start)
        part = io.BytesIO(stream.read(end - start))
        parts.append(_single(stack.enter_context(soundfile.SoundFile(part))))
    return parts


@functools.lru_cache(maxsize=64)
def _cached_layout(file: str, format: str, size: int, modified_ns: int) -> _Layout:
    """The layout of a file with many segments. `size` and `modified_ns` make the cache miss if it changed."""
    return _layout(Path(file), format)


def _layout(file: Path | bytes, format: str) -> _Layout:
    """Find the frames of an mp3, and files that were joined. `format` is libsndfile's name of the format."""
    find: dict[str, Callable[[bytes], _Layout | None]] = {
        "MP3": find_frames,
        "FLAC": joined_flac,
        "OGG": joined_ogg,
    }
    if format not in find:
        return []
    return find[format](file if isinstance(file, bytes) else file.read_bytes()) or []


def _single(sound: soundfile.SoundFile) -> Sound:
    return Sound(sound.frames, sound.samplerate, sound.channels, functools.partial(_blocks, sound))


def _blocks(sound: soundfile.SoundFile, first: int, count: int) -> Iterator[np.ndarray]:
    if first != sound.tell():
        sound.seek(first)
    while count and len(block := sound.read(min(count, _BLOCK), dtype="float32", always_2d=True)):
        count -= len(block)
        yield block


def _joined(sounds: list[Sound]) -> Sound:
    """The sequence of several files."""

    def blocks(first: int, count: int) -> Iterator[np.ndarray]:
        for sound in sounds:
            taken = max(0, min(count, sound.frames - first))
            if taken:
                for block in sound.blocks(first, taken):
                    count -= len(block)
                    taken -= len(block)
                    yield block
                if taken:  # the rest is damaged, and what follows would be at another time
                    return
            first = max(0, first - sound.frames)

    return Sound(sum(s.frames for s in sounds), sounds[0].sample_rate, sounds[0].channels, blocks)
