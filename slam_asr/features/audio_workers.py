"""Audio read and prepared in worker processes, ahead of the encoder.

Workers import torch but not transformers, and send arrays through pipes: nothing depends on the size
of /dev/shm, which is 64 MB in a container.
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
from typing import Any, TypeVar

import numpy as np
import torch

from slam_asr.audio import load_utterance
from slam_asr.errors import UserError
from slam_asr.manifest import Utterance
from slam_asr.models.frontend import Prepared, Preparer

Tag = TypeVar("Tag")


def workers_beside(accelerators: int, on_gpu: bool) -> int:
    """How many workers one process of an extraction gets where the recipe does not say.

    A GPU wants all cores that it can have; on a CPU one is enough, since the encoder needs the cores.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores // accelerators - 1)) if on_gpu else 1


class Loader:
    """Reads and prepares utterances in `workers` processes, which end with this one.

    Args:
        preparer: what the encoder wants done to waveforms.
        workers: processes.
    """

    def __init__(self, preparer: Preparer, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once there; each worker is a fork of that.
        context.set_forkserver_preload(["slam_asr.features.audio_workers"])
        self.workers = workers
        self._pool = ProcessPoolExecutor(workers, context, _begin, (preparer,))

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def batches(self, batches: Iterable[tuple[Tag, list[Utterance]]]) -> Iterator[tuple[Tag, list[Prepared]]]:
        """Each batch prepared, in the order given, with at least another one's worth of utterances on its way.

        Raises:
            UserError: audio that cannot be used, or a worker that was killed.
        """
        waiting: deque[tuple[Tag, list[Future]]] = deque()
        behind = 0
        try:
            for tag, utterances in batches:
                waiting.append((tag, [self._pool.submit(_prepare, u) for u in utterances]))
                behind += len(utterances) if len(waiting) > 1 else 0
                while behind >= max(len(waiting[0][1]), 2 * self.workers):
                    first = waiting.popleft()
                    behind -= len(waiting[0][1]) if waiting else 0
                    yield self._finished(first)
            while waiting:
                yield self._finished(waiting.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                "A process that prepares audio was killed, most often for want of memory: lower features.workers or encoder.batch_seconds."
            ) from error

    @staticmethod
    def _finished(batch: tuple[Tag, list[Future]]) -> tuple[Tag, list[Prepared]]:
        tag, futures = batch
        results = [future.result() for future in futures]
        return tag, [Prepared([torch.from_numpy(i) for i in inputs], samples) for inputs, samples in results]


_preparer: Any = None


def _begin(preparer: Preparer) -> None:
    """Set up a worker."""
    global _preparer
    _preparer = preparer
    # A signal at the parent's death would be the fork server's, and come to nothing where that died first.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted ends its workers
    torch.set_num_threads(1)


def _end_with(owner: multiprocessing.process.BaseProcess) -> None:
    """End this process when the one that it works for is gone, however that ended."""
    multiprocessing.connection.wait([owner.sentinel])
    os._exit(1)


def _prepare(utterance: Utterance) -> tuple[list[np.ndarray], int]:
    prepared = _preparer(load_utterance(utterance))
    return [i.numpy() for i in prepared.inputs], prepared.samples
