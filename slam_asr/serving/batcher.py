"""Dynamic batching: segments of all requests that wait at the same time are decoded together.

One thread owns the model. It fills a batch with one segment of each request in turn, so that a long recording
does not delay short ones. A batch is full when it reaches the recipe's `decoding.positions_per_batch`. The
limit counts positions, not segments, because memory and time depend on positions.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from slam_asr.artifacts.transcript import Piece
from slam_asr.config.recipe import Decoding
from slam_asr.serving.metrics import Metrics

if TYPE_CHECKING:
    import numpy as np

    from slam_asr.models.searcher import Answer


class Recognizer(Protocol):
    """The interface of a loaded model that the server uses; `decoding.transcriber.Transcriber` has it."""

    options: Decoding

    def pieces(self, samples: "np.ndarray") -> list[Piece]:
        """Divide a recording, float32 [samples] at 16 kHz, at its pauses."""

    def positions(self, piece: Piece) -> int:
        """Return the number of LLM positions of a piece's audio and the prompt."""

    def decode(self, pieces: Sequence[Piece]) -> "list[Answer]":
        """Decode a batch; return an answer for each piece, in the same order."""


OnLoaded = Callable[[BaseException | None], None]
"""A function that is called when a model is loaded, or with the exception that prevented it."""


class DecodingError(Exception):
    """The model failed on a piece; `__cause__` is the exception that it raised."""


class Job:
    """The pieces of one request.

    Args:
        pieces: pieces of the recording in chronological order.
        costs: number of LLM positions of each piece: those of its audio, the prompt and the longest answer.
    """

    def __init__(self, pieces: Sequence[Piece], costs: Sequence[int]) -> None:
        self.pieces, self.costs = pieces, costs
        self.taken = 0
        """Number of pieces, counted from the first, that are in a batch or already decoded."""
        self.submitted = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._outcomes: asyncio.Queue[Answer | Exception] = asyncio.Queue()

    def deliver(self, outcome: "Answer | Exception") -> None:
        """Pass the outcome of the next piece to `answers`. Any thread may call this."""
        # An asyncio queue is not thread-safe, so the event loop itself puts the outcome into it.
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits for the outcome
            self._loop.call_soon_threadsafe(self._outcomes.put_nowait, outcome)

    async def answers(self) -> "AsyncIterator[Answer]":
        """Yield the answers in the order of the pieces. The batcher decodes them in the same order.

        Raises:
            DecodingError: the model failed.
        """
        for _ in self.pieces:
            outcome = await self._outcomes.get()
            if isinstance(outcome, Exception):
                raise DecodingError from outcome
            yield outcome


class Batcher:
    """Decodes the pieces of many requests in common batches, in a thread of its own.

    Args:
        load: loads the model. It runs in the thread, which then owns the model.
        wait: seconds that a batch waits for more pieces.
        metrics: counts batches and answers.
        on_loaded: called in the thread when the model is loaded, or with the exception that `load` raised.
    """

    def __init__(
        self, load: Callable[[], Recognizer], wait: float, metrics: Metrics, on_loaded: OnLoaded
    ) -> None:
        self.wait, self.metrics = wait, metrics
        self.recognizer: Recognizer | None = None
        """The model; None until it is loaded."""
        self._load, self._on_loaded = load, on_loaded
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, pieces: Sequence[Piece]) -> Job:
        """Queue the pieces of a request. Call this in the event loop, after the model is loaded."""
        assert self.recognizer is not None, "requests are refused until the model is loaded"
        longest_answer = self.recognizer.options.max_new_tokens
        job = Job(pieces, [self.recognizer.positions(piece) + longest_answer for piece in pieces])
        with self._changed:
            # A silent recording has no pieces, and `answers` ends at once.
            if pieces:
                self._jobs.append(job)
            self._count_waiting()
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Remove those pieces of a request that are in no batch yet."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._count_waiting()

    def close(self) -> None:
        """End the thread after its current batch. If the model is still being loaded, do not wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        # Loading cannot be interrupted. Its thread is a daemon, which ends with the process.
        if self.recognizer is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.recognizer = self._load()
        except BaseException as error:
            self._on_loaded(error)
            return
        self._on_loaded(None)
        while batch := self._next_batch():
            self._decode(batch, self.recognizer)

    def _next_batch(self) -> list[tuple[Job, int]]:
        """Wait for pieces and take a batch of them; return an empty one when the batcher is closed."""
        with self._changed:
            while True:
                if self._closed:
                    return []
                if not self._jobs:
                    self._changed.wait()
                    continue
                # The time in which the previous batch was decoded counts too, so no batch waits under load.
                remaining = min(job.submitted for job in self._jobs) + self.wait - time.monotonic()
                if remaining <= 0 or self._is_full():
                    return self._take()
                self._changed.wait(remaining)

    def _is_full(self) -> bool:
        # This sum does not count padding, so `_take` may leave some of these pieces for the next batch.
        waiting = sum(sum(job.costs[job.taken :]) for job in self._jobs)
        return waiting * self._options.beams >= self._options.positions_per_batch

    def _take(self) -> list[tuple[Job, int]]:
        """Take a piece of each request in turn, up to the budget; return each with its index."""
        batch: list[tuple[Job, int]] = []
        longest, options = 0, self._options
        while self._jobs:
            job = self._jobs[0]
            longest = max(longest, job.costs[job.taken])
            # Shorter pieces are padded to the longest one.
            if batch and longest * options.beams * (len(batch) + 1) > options.positions_per_batch:
                break
            self._jobs.popleft()
            batch.append((job, job.taken))
            job.taken += 1
            # The request goes to the end of the queue, so that each request has a piece in the batch before
            # any has another.
            if job.taken < len(job.pieces):
                self._jobs.append(job)
        self._count_waiting()
        return batch

    def _decode(self, batch: list[tuple[Job, int]], recognizer: Recognizer) -> None:
        started = time.monotonic()
        outcomes: Sequence[Answer | Exception]
        try:
            outcomes = recognizer.decode([job.pieces[index] for job, index in batch])
        except Exception as error:
            outcomes = [error.with_traceback(None)]  # a traceback would hold the batch's tensors
        if isinstance(outcomes[0], Exception) and len(batch) > 1:
            # Memory may suffice for each half, and a bad piece must not fail the requests of the other
            # pieces.
            half = len(batch) // 2
            self._decode(batch[:half], recognizer)
            self._decode(batch[half:], recognizer)
            return
        self.metrics.batch_segments.observe(len(batch))
        self.metrics.batch_seconds.observe(time.monotonic() - started)
        for (job, _), outcome in zip(batch, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                self.metrics.close_calls.inc(bool(outcome.close))
                self.metrics.cut.inc(outcome.cut)
            job.deliver(outcome)

    @property
    def _options(self) -> Decoding:
        assert self.recognizer is not None, "requests are refused until the model is loaded"
        return self.recognizer.options

    def _count_waiting(self) -> None:
        self.metrics.waiting.set(sum(len(job.pieces) - job.taken for job in self._jobs))
