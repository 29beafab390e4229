"""The path of a request for a transcript through the server.

A request is admitted or refused at once, and read within the limits. A small pool of threads decodes its
audio to samples and divides them into pieces, which the batcher decodes. At the request's deadline, or when
its client disconnects, the request ends early, and its pieces are removed from the queue.
"""

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slam_asr.artifacts.transcript import Piece
from slam_asr.cores import usable_cores
from slam_asr.progress import log_line
from slam_asr.serving.answers import MEDIA_TYPES, Decoded, as_event, body_of, events_of
from slam_asr.serving.batcher import Batcher, DecodingError, OnLoaded, Recognizer
from slam_asr.serving.limits import Limits, Refusal, unavailable
from slam_asr.serving.metrics import Metrics
from slam_asr.serving.upload import Body, Keys, Order, decode_audio, read_order

T = TypeVar("T")
Events = AsyncGenerator[str, None]
"""Formatted server-sent events."""

CLIENT_GONE = 499
"""The status, in logs and metrics, of a request whose client disconnected before the end of the answer."""
MAX_SECONDS_IN_MEMORY = 3600.0
"""While this many seconds of decoded audio are in memory, further uploads wait and are not decoded yet."""


@dataclass(frozen=True)
class Served:
    """A model to serve, and the limits and keys of its clients."""

    load: Callable[[], Recognizer]
    """Loads the model."""
    names: list[str]
    """Names that clients may give for the model; logs, messages and the page use the first."""
    created: int
    """When the model was written, in seconds since 1970."""
    language: str
    """ISO 639-1 code of the model's language; empty if unknown."""
    stops: list[int]
    """Ids of the tokens that end an answer."""
    limits: Limits
    keys: Keys | None
    """API keys, one of which a client must send; None if no key is required."""


class Service:
    """The state of a server: what it serves, and how much is in progress.

    Args:
        served: the model and the limits.
        on_loaded: called in the batcher's thread when the model is loaded, or failed to load.
    """

    def __init__(self, served: Served, on_loaded: OnLoaded) -> None:
        self.served, self.limits = served, served.limits
        self.metrics = Metrics()
        self.batcher = Batcher(served.load, self.limits.wait, self.metrics, on_loaded)
        self.in_progress = 0
        """Number of requests for transcripts that are not completely answered yet."""
        self.draining = False
        """Whether the server only finishes the requests in progress, and accepts no new ones."""
        self._seconds = 0.0
        """Seconds of decoded audio in memory."""
        self._freed = asyncio.Event()
        self._pool = ThreadPoolExecutor(usable_cores(), "decode-audio")
        self._decoders = asyncio.Semaphore(usable_cores())

    @property
    def ready(self) -> bool:
        """Whether requests for transcripts are accepted."""
        return self.batcher.recognizer is not None and self.batcher.alive and not self.draining

    def close(self) -> None:
        """End the threads."""
        self.batcher.close()
        self._pool.shutdown(cancel_futures=True)

    def admit(self) -> None:
        """Refuse a request if the server cannot accept it now.

        Raises:
            Refusal: the model is not loaded, the server has failed or is ending, or too many requests are in
                progress.
        """
        if self.draining:
            raise unavailable("The server is shutting down: send the request again.")
        if not self.batcher.alive:
            raise unavailable("The server has failed and has to be restarted; its log has the reason.")
        if not self.ready:
            raise unavailable("The model is being loaded: try again in a few seconds.")
        if self.in_progress >= self.limits.requests:
            why = f"{self.in_progress} requests are in progress, as many as this server accepts: try again."
            raise Refusal(429, why, "rate_limit_exceeded", headers={"Retry-After": "1"})

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as in progress within the context."""
        self.in_progress += 1
        self.metrics.in_progress.set(self.in_progress)
        try:
            yield
        finally:
            self.in_progress -= 1
            self.metrics.in_progress.set(self.in_progress)

    @contextlib.asynccontextmanager
    async def pieces_of(self, form: FormData, name: str) -> AsyncIterator[tuple[float, list[Piece]]]:
        """Decode a form's file and divide it into pieces, whose samples are in memory within the context.

        Yields:
            The recording's duration in seconds, and the pieces.

        Raises:
            Refusal: the file cannot be used, for one of the reasons of `decode_audio`.
        """
        file, recognizer = form["file"], self.batcher.recognizer
        assert isinstance(file, UploadFile) and recognizer is not None, "`read_order` and `admit` check this"

        def work() -> tuple[float, list[Piece]]:
            clip = decode_audio(file, name, self.limits)
            return clip.duration, recognizer.pieces(clip.samples)

        async with self._decoders:
            # The semaphore is held during this wait too, so that at most one recording per core is decoded
            # beyond the limit.
            # Nothing is awaited between the check and `clear`, so no release is missed.
            while self._seconds >= MAX_SECONDS_IN_MEMORY:
                self._freed.clear()
                await self._freed.wait()
            duration, pieces = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        self._seconds += duration
        try:
            yield duration, pieces
        finally:
            self._seconds -= duration
            self._freed.set()

    async def decoded(self, pieces: list[Piece]) -> AsyncGenerator[Decoded, None]:
        """Yield the decoded pieces in chronological order, each as soon as it is ready.

        Raises:
            Refusal: the model failed.
        """
        job, remaining = self.batcher.submit(pieces), iter(pieces)
        try:
            async for answer in job.answers():
                yield Decoded.of(next(remaining), answer, self.served.stops)
        except DecodingError as error:
            traceback.print_exception(error.__cause__)
            raise Refusal(500, "The model failed on this recording: see the server's log.") from error
        finally:
            self.batcher.cancel(job)


class Exchange:
    """A request for a transcript and its answer.

    Args:
        service: the server's state.
        body: the request's body.
    """

    def __init__(self, service: Service, body: Body) -> None:
        self.service, self.body = service, body
        self.finished = False
        """Whether `finish` has counted the request."""
        self._started = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + service.limits.deadline
        self._duration, self._segments = 0.0, 0

    async def answer(self) -> Response:
        """Return the complete transcript, or a stream of its events.

        Raises:
            Refusal: the request is wrong or took too long, or the model failed.
            ClientDisconnect: the client has disconnected.
        """
        served = self.service.served
        async with contextlib.AsyncExitStack() as owned:
            owned.enter_context(self.service.counted())
            async with self._in_time():
                form = await self.body.form()
            owned.push_async_callback(form.close)
            order = read_order(form, served.names, served.language)
            headers = {"x-ignored-parameters": ", ".join(order.ignored)} if order.ignored else {}
            if order.stream:
                # From here on, the stream owns `counted` and the form. Otherwise both would be closed before
                # the first event.
                return _EventStream(self, self._events(form, order), owned.pop_all(), headers)
            text = await _unless_gone(self.body.request, self._complete(form, order))
            self.finish(200)
            return Response(text, media_type=MEDIA_TYPES[order.format], headers=headers)

    async def _complete(self, form: FormData, order: Order) -> str:
        async with self._in_time(), self.service.pieces_of(form, order.name) as (self._duration, pieces):
            self._segments = len(pieces)
            decoded = [part async for part in self.service.decoded(pieces)]
        return body_of(order.format, self._duration, order.language, decoded)

    async def _events(self, form: FormData, order: Order) -> Events:
        # The HTTP status has already been sent, so a refusal becomes an event.
        try:
            async with (
                self._in_time(),
                self.service.pieces_of(form, order.name) as (self._duration, pieces),
                contextlib.aclosing(self.service.decoded(pieces)) as decoded,
            ):
                self._segments = len(pieces)
                async for event in events_of(order.format, self._duration, decoded):
                    yield event
            self.finish(200)
        except Refusal as refusal:
            self.finish(refusal.status)
            yield as_event(refusal.body)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Refuse the request if its deadline passes within the context."""
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            late = f"The transcript was not finished within {self.service.limits.deadline:g} s"
            why = f"{late}: send a shorter recording, or try again when the server is less busy."
            # OpenAI's clients repeat a request at once after a 5xx, which would only add to the load.
            raise Refusal(504, why, "deadline_exceeded", headers={"x-should-retry": "false"}) from None

    def finish(self, status: int) -> None:
        """Count and log the end of the request. The log line contains nothing of the transcript."""
        seconds, metrics = time.monotonic() - self._started, self.service.metrics
        self.finished = True
        metrics.requests.labels(str(status)).inc()
        if status == 200:
            metrics.request_seconds.observe(seconds)
            metrics.audio_seconds.inc(self._duration)
        log_line(f"{status} in {seconds:.2f} s, {self._duration:.1f} s of audio, {self._segments} segments")


class _EventStream(StreamingResponse):
    """The server-sent events of an exchange.

    The exchange is finished even if the client disconnects before the first event.

    Args:
        exchange: the exchange.
        events: the formatted events.
        owned: contexts to close after the last event.
        headers: additional headers of the response.
    """

    def __init__(
        self, exchange: Exchange, events: Events, owned: contextlib.AsyncExitStack, headers: dict[str, str]
    ) -> None:
        # Without these headers, proxies could hold back the events.
        headers = headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._exchange, self._events, self._owned = exchange, events, owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._owned:
            try:
                await super().__call__(scope, receive, send)
            except Exception:
                self._exchange.finish(500)
                raise
            finally:
                # Otherwise, the generator would release pieces and memory only when it is garbage-collected.
                await self._events.aclose()
                if not self._exchange.finished:
                    self._exchange.finish(CLIENT_GONE)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, or cancel it as soon as the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """

    async def gone() -> None:
        # The body has been read, so the only message that can still come is that the client has disconnected.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        # A cancelled task still has to run its `finally` blocks, which remove the request's pieces from the
        # queue.
        await asyncio.gather(working, watching, return_exceptions=True)
