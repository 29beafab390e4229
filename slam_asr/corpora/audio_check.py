"""Checks the audio of a corpus. Threads decode each utterance once, a few chunks ahead of the results."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from slam_asr.artifacts.manifest import Utterance
from slam_asr.audio import AudioError, Fault, audio_sha256, read_clip
from slam_asr.config.recipe import Data
from slam_asr.cores import usable_cores
from slam_asr.corpora import AUDIO_FOLDER, AUDIO_SUFFIXES, Candidate, Item, Reason, Rejection
from slam_asr.progress import Meter
from slam_asr.storage import name_of
from slam_asr.storage.local import temporary_path

_CHUNK = 8
"""Utterances per task of a thread. A larger number reduces overhead, but progress is shown less often."""
_MIN_REMOTE_THREADS = 16
"""Minimum number of threads for audio in object storage, because they mostly wait for the network."""
_CHUNKS_AHEAD = 3
"""Maximum number of chunks per thread that are in progress or queued. It limits the memory for audio that is
embedded in tables."""


@dataclass
class Checked:
    """An utterance whose audio can be used."""

    utterance: Utterance
    channels: int
    """Number of channels of the audio file."""
    split: str = ""
    """The split of the utterance, as in `Candidate`."""


def check_all(
    items: Iterable[Item],
    data: Data,
    label: str,
    folder: Path | None = None,
    total: int | None = None,
    remote: bool = False,
) -> Iterator[Checked | Rejection]:
    """Decode the audio of every candidate; yield results in the order of `items`. Rejections pass through.

    Threads suffice, because decoding, resampling and hashing release the GIL. Unlike processes, they also
    work in a notebook, in a script without a main guard, and in a daemon.

    Args:
        items: candidates and rejections. Only a limited number of them is read ahead of the results.
        data: the recipe's `data` section, which limits the duration.
        label: text of the progress display.
        folder: the stage's folder, to which audio embedded in tables is written. Required if an item has
            `content`.
        total: number of items, for the progress display.
        remote: whether the audio is in object storage.
    """
    threads = max(usable_cores(), _MIN_REMOTE_THREADS if remote else 1)
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[list[Checked | Rejection]]] = deque()

    def check_chunk(chunk: list[Item]) -> list[Checked | Rejection]:
        return [_check(item, data, folder) for item in chunk]

    try:
        with Meter(label, total=total, unit="files") as meter:
            remaining = iter(items)
            while (chunk := list(islice(remaining, _CHUNK))) or pending:
                if chunk:
                    pending.append(pool.submit(check_chunk, chunk))
                if not chunk or len(pending) >= _CHUNKS_AHEAD * threads:
                    results = pending.popleft().result()
                    meter.update(len(results))
                    yield from results
    finally:
        # After an error or an interrupt, the files that are still queued are not decoded.
        pool.shutdown(cancel_futures=True)


def _check(item: Item, data: Data, folder: Path | None) -> Checked | Rejection:
    """Decode a candidate's audio, and measure its duration."""
    if isinstance(item, Rejection):
        return item
    key, source = item.key, item.source
    try:
        span = (item.start, item.duration)
        clip = read_clip(
            source, data.max_duration, *span, item.content, item.channel, item.channel_of_several
        )
        # A clip has no SHA-256 if its file was not read completely, as for a segment.
        sha256 = clip.sha256 or audio_sha256(source)
    except AudioError as error:
        if error.reason == Fault.MISSING:
            return Rejection(key, source, Reason.NO_AUDIO, f"There is no audio file {source}.")
        return Rejection(key, source, error.reason, str(error))
    # A file that the disk cannot read must not end the check of the other files.
    except OSError as error:
        return Rejection(key, source, Fault.UNREADABLE, f"{source} cannot be read: {error.strerror}.")
    if clip.duration < data.min_duration:
        limit = f"data.min_duration ({data.min_duration:g} s)"
        detail = f"The length of {_named(item)} is {clip.duration:.3f} s, below {limit}."
        return Rejection(key, source, Reason.TOO_SHORT, detail)
    if clip.silent:
        detail = f"All samples of {_named(item)} have the same value: it was recorded without a signal."
        return Rejection(key, source, Fault.SILENT, detail)
    manifest_source = item.manifest_source or source
    if item.content is not None:
        assert folder is not None, "audio embedded in a table needs a folder to be written to"
        manifest_source = _write_embedded(item.content, sha256, source, folder)
    utterance = Utterance(
        key, manifest_source, item.text, clip.duration, clip.sample_rate, sha256, item.extra, start=item.start
    )
    utterance.audio_channel = item.channel if clip.channels > 1 else None
    return Checked(utterance, clip.channels, item.split)


def _named(item: Candidate) -> str:
    """Return the name of a candidate's file or segment, for messages."""
    return item.source if item.start is None else f"the segment of {item.source} at {item.start:.2f} s"


def _write_embedded(content: bytes, sha256: str, name: str, folder: Path) -> str:
    """Write audio from a table to a file named by its SHA-256, and return its path relative to `folder`."""
    path = f"{AUDIO_FOLDER}/{sha256[:2]}/{sha256}{_suffix_of(content, name)}"
    file = folder / path
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # No fsync, because it would take most of the time for many small files, and the SHA-256 reveals
        # damage. Two threads may write the same audio, each to its own temporary file.
        partial = temporary_path(file)
        partial.write_bytes(content)
        os.replace(partial, file)
    return path


def _suffix_of(content: bytes, name: str) -> str:
    """Return the suffix that fits the content's first bytes, or else the suffix of the name in the table."""
    for magic, suffix in ((b"fLaC", ".flac"), (b"RIFF", ".wav"), (b"OggS", ".ogg"), (b"ID3", ".mp3")):
        if content.startswith(magic):
            return suffix
    suffix = os.path.splitext(name_of(name))[1].lower()
    return suffix if suffix in AUDIO_SUFFIXES else ".audio"
