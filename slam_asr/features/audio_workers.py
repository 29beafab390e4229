"""Worker processes that read and prepare audio ahead of the encoder.

Workers import torch but not transformers. They send arrays through pipes instead of shared memory, because
/dev/shm has only 64 MB in a container by default, and a process crashes if it is full
(https://github.com/pytorch/pytorch/issues/5040).
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import numpy as np
import torch

from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.cores import usable_cores
from slam_asr.errors import ConfigurationError
from slam_asr.models.encoders.frontend import Prepared, Preparer

Tag = TypeVar("Tag")
_Arrays = tuple[list[np.ndarray], int]
"""A `Prepared` as it is sent: its `inputs` as float32 arrays, and its `samples`. Tensors would be sent
through shared memory."""


def default_workers(processes: int, on_gpu: bool) -> int:
    """Return the number of workers per extraction process, for a recipe that does not set it.

    If the encoder runs on a GPU, the CPU cores are free for workers. If it runs on the CPU, it needs the
    cores itself, and a single worker prepares audio fast enough.

    Args:
        processes: number of processes of the extraction on this machine.
        on_gpu: whether the encoder runs on a GPU.
    """
    cores = usable_cores()
    # One core of each process' share is left for the process itself, which runs the encoder.
    return max(1, min(16, cores // processes - 1)) if on_gpu else 1


class AudioLoader:
    """Reads and prepares utterances in worker processes, which end when this process ends.

    Args:
        preparer: converts a waveform to the encoder's input.
        workers: number of worker processes.
    """

    def __init__(self, preparer: Preparer, workers: int) -> None:
        # Not `fork`: this process has threads, and a GPU that is in use cannot be used by a forked process.
        context = multiprocessing.get_context("forkserver")
        # The fork server imports this module once; each worker is forked from it.
        context.set_forkserver_preload(["slam_asr.features.audio_workers"])
        self.workers = workers
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (preparer,))

    def __enter__(self) -> "AudioLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, batches: Iterable[tuple[Tag, list[Utterance]]]) -> Iterator[tuple[Tag, list[Prepared]]]:
        """Prepare batches in order, while the workers stay ahead of the caller.

        A batch is yielded once enough utterances of later batches are queued: at least as many as the batch
        has, and at least two per worker. Workers therefore have work while the caller encodes the batch. At
        the end, the remaining batches are yielded without waiting for others.

        Args:
            batches: pairs of a tag, which is returned unchanged, and a list of utterances.

        Yields:
            Each batch's tag and its prepared utterances, in the order of the batch.

        Raises:
            AudioError: an audio file is missing, damaged, empty or too short.
            InputError: an audio file differs from its manifest.
            ConfigurationError: a worker was killed.
        """
        pending: deque[tuple[Tag, list[Future[_Arrays]]]] = deque()
        ahead = 0  # number of utterances in all pending batches except the first
        try:
            for tag, utterances in batches:
                pending.append((tag, [self._pool.submit(_prepare, u) for u in utterances]))
                ahead += len(utterances) if len(pending) > 1 else 0
                while ahead >= max(len(pending[0][1]), 2 * self.workers):
                    first = pending.popleft()
                    ahead -= len(pending[0][1]) if pending else 0
                    yield self._result(first)
            while pending:
                yield self._result(pending.popleft())
        except BrokenProcessPool as error:
            raise ConfigurationError(
                "A process that prepares audio was killed, most often because memory ran out: "
                "lower features.workers or encoder.batch_seconds."
            ) from error

    @staticmethod
    def _result(batch: tuple[Tag, list[Future[_Arrays]]]) -> tuple[Tag, list[Prepared]]:
        tag, futures = batch
        results = [future.result() for future in futures]
        return tag, [Prepared([torch.from_numpy(i) for i in inputs], samples) for inputs, samples in results]


_preparer: Preparer | None = None
"""The preparer of this worker process. It is set at the start, so that it is not sent with each utterance."""


def _start_worker(preparer: Preparer) -> None:
    global _preparer
    _preparer = preparer
    # `die_with_parent` would not work here: for the kernel, the parent of this process is the fork server.
    # The parent that multiprocessing reports is the owner of the pool.
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the owner, which ends its workers
    # The workers already share the cores. Several threads in each worker would compete for them.
    torch.set_num_threads(1)


def _exit_with(owner: multiprocessing.process.BaseProcess) -> None:
    """End this process when the owner of the pool ends, for whatever reason."""
    multiprocessing.connection.wait([owner.sentinel])
    os._exit(1)


def _prepare(utterance: Utterance) -> _Arrays:
    assert _preparer is not None  # set by _start_worker
    prepared = _preparer(load_utterance(utterance))
    return [i.numpy() for i in prepared.inputs], prepared.samples
