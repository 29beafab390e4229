"""Whether the audio can be used: every file decoded once, many at a time."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from slam_asr.audio import MISSING, UNREADABLE, AudioError, read_clip
from slam_asr.corpora import NO_AUDIO, TOO_SHORT, Candidate, Rejection
from slam_asr.manifest import Utterance
from slam_asr.progress import Meter
from slam_asr.recipe import Data
from slam_asr.storage import sha256_of_file

_CHUNK = 8
"""Files a worker takes at once: few enough for a lively progress display."""


@dataclass
class Checked:
    """An utterance whose audio is good."""

    utterance: Utterance
    channels: int


def workers() -> int:
    return os.cpu_count() or 1


def check_all(candidates: list[Candidate], data: Data, label: str) -> list[Checked | Rejection]:
    """Every candidate checked, in the order given whatever the number of workers.

    Threads, because decoding, resampling and hashing all leave Python's lock, and threads work in
    whatever program calls the stage: in a notebook, in a script without a main guard, in a daemon.
    """
    chunks = [candidates[start : start + _CHUNK] for start in range(0, len(candidates), _CHUNK)]
    results: list[Checked | Rejection] = []
    pool = ThreadPoolExecutor(workers())
    try:
        with Meter(label, total=len(candidates), unit="files") as meter:
            for part in pool.map(lambda chunk: [_check(c, data) for c in chunk], chunks):
                results += part
                meter.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _check(candidate: Candidate, data: Data) -> Checked | Rejection:
    """Decode one file, and take its measure."""
    key, source = candidate.key, candidate.source
    try:
        clip = read_clip(source, longest=data.max_duration)
        sha256 = sha256_of_file(source)
    except AudioError as error:
        reason = NO_AUDIO if error.reason == MISSING else error.reason
        return Rejection(key, source, reason, str(error))
    except OSError as error:
        return Rejection(key, source, UNREADABLE, f"{source} cannot be read: {error.strerror}.")
    if clip.duration < data.min_duration:
        detail = f"{source} lasts {clip.duration:.3f} s, shorter than {data.min_duration:g} s."
        return Rejection(key, source, TOO_SHORT, detail)
    utterance = Utterance(key, source, candidate.text, clip.duration, clip.sample_rate, sha256, extra=candidate.extra)
    return Checked(utterance, clip.channels)
