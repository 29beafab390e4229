"""Makes files like those of phones and browsers, by ffmpeg's encoders through PyAV."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

FORMATS = {
    "m4a": ("ipod", "aac", 44_100, {}),
    "mp4": ("mp4", "aac", 48_000, {}),
    "mp4 in fragments": ("mp4", "aac", 48_000, {"movflags": "frag_keyframe+empty_moov"}),
    "mp4 opus in fragments": ("mp4", "libopus", 48_000, {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mov", "aac", 44_100, {}),
    "mov pcm": ("mov", "pcm_s16le", 44_100, {}),
    "m4a alac": ("ipod", "alac", 44_100, {}),
    "3gp": ("3gp", "libopencore_amrnb", 8_000, {}),
    "amr": ("amr", "libopencore_amrnb", 8_000, {}),
    "aac": ("adts", "aac", 44_100, {}),
    "webm": ("webm", "libopus", 48_000, {}),
    "webm without length": ("webm", "libopus", 48_000, {"live": "1"}),
    "mkv flac": ("matroska", "flac", 16_000, {}),
    "wma": ("asf", "wmav2", 44_100, {}),
    "caf alac": ("caf", "alac", 44_100, {}),
}
"""Container, encoder, sample rate in Hz, and options of the container, keyed by name."""
LOSSLESS = ("mov pcm", "m4a alac", "mkv flac")


def encoded(name: str, samples: np.ndarray, picture: bool = False, **options: str) -> bytes:
    """Encode audio.

    Args:
        name: a key of `FORMATS`.
        samples: float32 [samples, channels] at the format's sample rate. If empty, there is no audio track.
        picture: whether the file gets a video track as well, as its first track.
        options: more options of the container.
    """
    container, codec, rate, own = FORMATS[name]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=own | options) as output:
        video = (
            output.add_stream("libx264", rate=25, width=32, height=32, pix_fmt="yuv420p") if picture else None
        )
        track = add_audio(output, codec, rate, samples.shape[1]) if samples.size else None
        if video is not None:
            for number in range(25):
                pixels = np.full((32, 32, 3), 10 * number % 256, np.uint8)
                output.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(video.encode(None))
        for packet in packets_of(track, samples, rate) if track is not None else ():
            output.mux(packet)
    return buffer.getvalue()


def add_audio(output, codec: str, rate: int, channels: int):
    """Add an audio track to a container."""
    track = output.add_stream(codec, rate=rate)
    track.layout = {1: "mono", 2: "stereo"}[channels]
    if not codec.startswith(("pcm", "flac", "alac", "libopencore")):
        track.bit_rate = 128_000 * channels
    return track


def packets_of(track, samples: np.ndarray, rate: int):
    """Yield the packets of a track that encode float32 [samples, channels]."""
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples.T, np.float32), format="fltp", layout=track.layout
    )
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    formats = av.codec.Codec(track.name, "w").audio_formats or [track.format]
    resampler = av.AudioResampler(format=formats[0].name, layout=track.layout, rate=rate)
    for converted in [*resampler.resample(frame), *resampler.resample(None)]:
        yield from track.encode(converted)
    yield from track.encode(None)


def repeated(content: bytes, times: int) -> bytes:
    """Repeat the packets of an m4a several times, which makes a long file within a second."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format="ipod") as output:
        track = output.add_stream_from_template(source.streams.audio[0])
        packets = [packet for packet in source.demux(source.streams.audio[0]) if packet.size]
        for number in range(times * len(packets)):
            packet = packets[number % len(packets)]
            packet.pts = packet.dts = number * packets[0].duration
            packet.stream = track
            output.mux(packet)
    return buffer.getvalue()


def caf_with_aac(samples: np.ndarray, rate: int) -> bytes:
    """Make a Core Audio file with AAC, which ffmpeg cannot write (Apple's specification of CAF 1.0)."""
    with av.open(io.BytesIO(encoded("m4a", samples))) as source:
        track = source.streams.audio[0]
        extra = track.codec_context.extradata
        packets = [bytes(packet) for packet in source.demux(track) if packet.size]
    # Each integer takes two bytes, with 7 bits in each; the highest bit of the first byte is set.
    sizes = b"".join(bytes([0x80 | len(p) >> 7, len(p) & 0x7F]) for p in packets)
    # Frames that the decoder outputs before the audio begins. A packet has 1024 frames.
    priming = 1024
    # Numbers of packets, of valid frames, of priming frames, and of frames that pad the last packet.
    table = struct.pack(
        ">qqii", len(packets), len(samples), priming, 1024 * len(packets) - priming - len(samples)
    )
    specific = descriptor(5, extra)
    decoder = descriptor(4, b"\x40\x15" + bytes(11) + specific)
    description = struct.pack(">d4sIIIII", rate, b"aac ", 0, 0, 1024, samples.shape[1], 0)
    chunks = {
        b"desc": description,
        b"kuki": descriptor(3, bytes(3) + decoder + descriptor(6, b"\x02")),
        b"pakt": table + sizes,
        b"data": bytes(4) + b"".join(packets),
    }
    return b"caff\0\1\0\0" + b"".join(
        struct.pack(">4sq", name, len(content)) + content for name, content in chunks.items()
    )


def descriptor(tag: int, content: bytes) -> bytes:
    """Make a descriptor of MPEG-4 (ISO/IEC 14496-1, 7.2.2) with the long form of its length, like Apple."""
    return bytes([tag, 0x80, 0x80, 0x80, len(content)]) + content
