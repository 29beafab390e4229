"""Decodes the files of phones and browsers with ffmpeg: MP4, QuickTime, WebM, WMA, AMR, AAC and CAF.

PyAV, an optional package, contains ffmpeg's libraries. A file is decoded from its start, frame by frame, so
that a long file takes little memory. The format is found from the content, never from the name. Only that
format's reader and the decoders in `DECODERS` are used: none that opens another file or an address, and none
for pictures. The first audio track is decoded.

The samples that an encoder added are cut off if the file marks them: those before the recording (edit lists
of MP4, the codec delay of WebM), and those after its end (the track's duration in MP4 and CAF). AAC without a
container and MP4 in fragments have no such marks, so up to two frames of silence remain.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from slam_asr.audio.containers import ContainerFault
from slam_asr.audio.faults import CHANGED_TEXT, AudioError, Fault, more_than_announced
from slam_asr.audio.media_lengths import FORMATS, check_media
from slam_asr.audio.sound import Sound
from slam_asr.errors import ConfigurationError

DECODERS = (
    *("aac", "alac", "mp3float", "mp3", "opus", "vorbis", "flac"),
    *("amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb", "ac3", "eac3"),
    *("wmav1", "wmav2", "wmapro", "wmavoice", "wmalossless", "adpcm_ima_qt", "gsm"),
    *("pcm_u8", "pcm_s8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be"),
    *("pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_mulaw", "pcm_alaw"),
)
"""The decoders of ffmpeg that may be used."""
_UNDECODABLE = "is damaged: it cannot be decoded to its end"
_MAX_CHANNELS = 64
_SLACK = 0.2
"""Seconds by which the decoded length may differ from that of the packets: encoders delay by a few frames."""
_ROUNDING = 0.05
"""Further fraction by which it may differ, because WebM and WMA round a packet's length to milliseconds."""


def open_media(stream: BinaryIO, kind: str, path: str | os.PathLike) -> Sound:
    """Open the first audio track of a file that only ffmpeg reads.

    Args:
        stream: the file. It stays open as long as the result is used.
        kind: ffmpeg's name of the format, a key of `FORMATS`.
        path: the file's name in messages.

    Raises:
        ContainerFault: the file ends too early, is encrypted, or is damaged.
        AudioError: the file has no audio track or no samples, or its codec is not in `DECODERS`.
        ConfigurationError: PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ConfigurationError(
            f"{path} is {FORMATS[kind][0]}, which the package av decodes, and that is not installed: run "
            "`pip install av` (for an image, add it to the build), or convert the file to wav or flac."
        )
    check_media(stream, kind)
    track = _Track(stream, kind, path)
    seconds, frame = track.measure()
    rate, channels = frame.sample_rate, frame.layout.nb_channels

    def read(first: int, count: int) -> Iterator[np.ndarray]:
        return track.blocks(rate, channels)

    return Sound(round(seconds * rate), rate, channels, read, estimated=True, has_segments=False)


class _Track:
    """The first audio track of a file, which each method opens and reads from the start."""

    def __init__(self, stream: BinaryIO, kind: str, path: str | os.PathLike) -> None:
        self.stream, self.kind, self.path = stream, kind, path
        self.shortest = self.longest = 0.0
        """Bounds of the length in seconds, from the times of the packets."""
        self.announced: float | None = None
        """Length of the recording in seconds, without added samples; None if the header does not have it."""

    def measure(self) -> tuple[float, Any]:
        """Find the length that the packets announce, and the first decoded frame.

        The frame has the true sample rate and channels. A header of HE-AAC may announce half of them.

        Returns:
            The estimated length in seconds, and the frame.

        Raises:
            AudioError: nothing can be decoded.
            ContainerFault: the file is damaged.
        """
        first, total, begin, end, tick, complete = None, 0, None, 0, 0, True
        for packet in self._packets():
            if first is None:
                # Decoders lag, so the first packets may give no frame.
                first = next(iter(_decoded(packet)), None)
            # The empty packet only flushes the decoder. Packets to discard are before the recording (edit
            # lists of MP4).
            if packet.size == 0 or packet.is_discard:
                continue
            duration = packet.duration or 0
            complete &= duration > 0
            total += duration
            if packet.pts is not None:
                begin = packet.pts if begin is None else min(begin, packet.pts)
                end = max(end, packet.pts + duration)
            tick = packet.time_base
        if first is None:
            raise AudioError(f"{self.path} has no samples.", Fault.EMPTY)
        span = end - begin if begin is not None else total
        # If a packet has no duration, the sum is not a lower bound.
        self.shortest = float(total * tick) if complete else 0.0
        # The span includes gaps between packets, which the sum of durations does not.
        self.longest = float(max(total, span) * tick)
        return self.shortest or self.longest, first

    def blocks(self, rate: int, channels: int) -> Iterator[np.ndarray]:
        """Decode the track; yield blocks of float32 [samples, channels], about a second each.

        Raises:
            ContainerFault: the file is damaged.
        """
        pending: list[np.ndarray] = []
        done = waiting = 0
        limit = (self.longest * (1 + _ROUNDING) + _SLACK) * rate
        for packet in self._packets():
            for frame in _decoded(packet):
                if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                    raise ContainerFault(CHANGED_TEXT)
                # The last frame is held back, because its end may not belong to the recording.
                if waiting >= rate:
                    yield np.concatenate(pending)
                    done, waiting, pending = done + waiting, 0, []
                pending.append(_as_float(frame))
                waiting += len(pending[-1])
            if done + waiting > limit:
                raise ContainerFault(more_than_announced(f"more than {self.longest:.2f} s"))
        if done + waiting < (self.shortest * (1 - _ROUNDING) - _SLACK) * rate:
            raise ContainerFault(
                f"is damaged: it should last {self.shortest:.2f} s, but only "
                f"{(done + waiting) / rate:.2f} s can be decoded"
            )
        if pending:
            # Samples of the last frame beyond the announced length are the encoder's padding.
            excess = done + waiting - round(self.announced * rate) if self.announced else 0
            last = len(pending[-1])
            yield np.concatenate(pending)[: waiting - excess if 0 < excess < last else None]

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the track, and an empty one at the end.

        Raises:
            AudioError: the file has no audio track, or one that cannot be decoded.
            ContainerFault: the file is damaged.
        """
        av: Any = importlib.import_module("av")
        stream, options = self.stream, {"codec_whitelist": ",".join(DECODERS)}
        stream.seek(0)
        # PyAV would pass a file's name on to ffmpeg, so it gets a stream without a name.
        unnamed = SimpleNamespace(read=stream.read, seek=stream.seek, tell=stream.tell)
        with (
            _errors_as_faults(),
            av.open(unnamed, format=self.kind, options=options, metadata_errors="replace") as container,
        ):
            yield from self._packets_of(container)

    def _packets_of(self, container: Any) -> Iterator[Any]:
        if not container.streams.audio:
            raise AudioError(f"{self.path} has no audio track: there is nothing to transcribe.", Fault.EMPTY)
        track = container.streams.audio[0]
        codec = track.codec_context
        if codec is None or codec.name not in DECODERS:
            name = codec.name if codec else "unknown"
            raise AudioError(
                f"{self.path} has an audio track of a codec that is not read here ({name}): convert it to "
                "wav or flac."
            )
        if codec.channels > _MAX_CHANNELS:
            raise ContainerFault(f"is damaged: its header announces {codec.channels} channels")
        # Fragments of MP4 announce no samples, so the track's duration is not the recording's.
        has_exact_end = self.kind in ("mov", "caf") and track.duration is not None and track.frames > 0
        self.announced = float(track.duration * track.time_base) if has_exact_end else None
        for packet in container.demux(track):
            if packet.is_corrupt:
                raise ContainerFault(_UNDECODABLE)
            yield packet


@contextlib.contextmanager
def _errors_as_faults() -> Iterator[None]:
    av: Any = importlib.import_module("av")
    try:
        yield
    except (av.FFmpegError, EOFError, ValueError, IndexError, MemoryError) as error:
        raise ContainerFault(_UNDECODABLE) from error


def _decoded(packet: Any) -> list[Any]:
    """Decode a packet into frames: none or several, because decoders lag."""
    with _errors_as_faults():
        frames: list[Any] = packet.decode()
        return frames


def _as_float(frame: Any) -> np.ndarray:
    """Return the samples of a frame as float32 [samples, channels], with full scale 1."""
    samples = frame.to_ndarray()
    # Planar frames are [channels, samples]; others are [1, samples · channels].
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.uint8:
        # Only samples of 8 bits are unsigned: 128 is silence.
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)
