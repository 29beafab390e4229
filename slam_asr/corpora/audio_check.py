"""Whether the audio can be used: every file decoded once, many at a time, few ahead."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slam_asr.audio import MISSING, UNREADABLE, AudioError, audio_sha256, read_clip
from slam_asr.corpora import AUDIO_FOLDER, AUDIO_SUFFIXES, NO_AUDIO, TOO_SHORT, Candidate, Rejection
from slam_asr.manifest import Utterance
from slam_asr.progress import Meter
from slam_asr.recipe import Data
from slam_asr.storage import name_of

_CHUNK = 8
"""Files a worker takes at once: few enough for a lively progress display."""
_REMOTE = 16
"""Workers at least where audio comes over a network, which mostly waits."""
_AHEAD = 3
"""Chunks for each worker that are under way or wait: bounds what is held of audio that lies in tables."""


@dataclass
class Checked:
    """An utterance whose audio is good."""

    utterance: Utterance
    channels: int
    split: str = ""


def workers() -> int:
    return os.cpu_count() or 1


def check_all(
    items: Iterable[Candidate | Rejection],
    data: Data,
    label: str,
    folder: Path | None = None,
    total: int | None = None,
    remote: bool = False,
) -> Iterator[Checked | Rejection]:
    """Every candidate checked, in the order given whatever the number of workers; rejections pass through.

    Threads, because decoding, resampling and hashing all leave Python's lock, and threads work in
    whatever program calls the stage: in a notebook, in a script without a main guard, in a daemon.

    Args:
        items: taken as they are needed.
        data: limits of the duration.
        label: of the progress display.
        folder: where audio that lies in tables becomes files.
        total: how many there are, for the display.
        remote: whether their audio lies in object storage.
    """
    threads = max(workers(), _REMOTE) if remote else workers()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future] = deque()
    try:
        with Meter(label, total=total, unit="files") as meter:
            remaining = iter(items)
            while chunk := list(islice(remaining, _CHUNK)):
                waiting.append(
                    pool.submit(lambda chunk: [_check(item, data, folder) for item in chunk], chunk)
                )
                if len(waiting) >= _AHEAD * threads:
                    yield from _finished(waiting, meter)
            while waiting:
                yield from _finished(waiting, meter)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[Future], meter: Meter) -> list[Checked | Rejection]:
    part = waiting.popleft().result()
    meter.update(len(part))
    return part


def _check(item: Candidate | Rejection, data: Data, folder: Path | None) -> Checked | Rejection:
    """Decode one file, and take its measure."""
    if isinstance(item, Rejection):
        return item
    key, source = item.key, item.source
    try:
        clip = read_clip(source, longest=data.max_duration, **_part_of(item))
        sha256 = clip.sha256 or audio_sha256(source)
    except AudioError as error:
        missing = error.reason == MISSING
        return Rejection(
            key,
            source,
            NO_AUDIO if missing else error.reason,
            f"There is no audio file {source}." if missing else str(error),
        )
    except OSError as error:
        return Rejection(key, source, UNREADABLE, f"{source} cannot be read: {error.strerror}.")
    if clip.duration < data.min_duration:
        detail = f"{source} lasts {clip.duration:.3f} s, shorter than {data.min_duration:g} s."
        return Rejection(key, source, TOO_SHORT, detail)
    listed = item.listed or source
    if item.content is not None:
        listed = _keep(item.content, sha256, source, folder)
    utterance = Utterance(
        key, listed, item.text, clip.duration, clip.sample_rate, sha256, item.extra, start=item.start
    )
    return Checked(utterance, clip.channels, item.split)


def _part_of(item: Candidate) -> dict[str, Any]:
    """Arguments for what is not a whole file on disk."""
    part = {"start": item.start, "duration": item.duration, "content": item.content}
    return {name: value for name, value in part.items() if value is not None}


def _keep(content: bytes, sha256: str, name: str, folder: Path) -> str:
    """Write audio from a table under a name that its content gives it → that name, relative to the manifest."""
    listed = f"{AUDIO_FOLDER}/{sha256[:2]}/{sha256}{_suffix_of(content, name)}"
    file = folder / listed
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Flushing each of many small files would take most of the time; the digest tells a damaged one.
        aside = file.with_name(f".{sha256}.{os.getpid()}.{threading.get_ident()}.partial")
        aside.write_bytes(content)
        os.replace(aside, file)
    return listed


def _suffix_of(content: bytes, name: str) -> str:
    for start, suffix in ((b"fLaC", ".flac"), (b"RIFF", ".wav"), (b"OggS", ".ogg"), (b"ID3", ".mp3")):
        if content.startswith(start):
            return suffix
    suffix = os.path.splitext(name_of(name))[1].lower()
    return suffix if suffix in AUDIO_SUFFIXES else ".audio"
