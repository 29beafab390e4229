"""The numbers that Prometheus reads at /metrics."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "slam_asr_requests",
            "Requests for a transcript by status: the HTTP status, that of an error within a stream, or 499 "
            "if the client disconnected early.",
            ["status"],
        )
        self.request_seconds = histogram(
            "slam_asr_request_seconds",
            "Seconds from the start of a request to its complete answer, for requests with status 200.",
            buckets=_SECONDS,
        )
        self.audio_seconds = counter(
            "slam_asr_audio_seconds", "Seconds of audio in the requests with status 200."
        )
        self.in_progress = gauge("slam_asr_requests_in_progress", "Requests that are not answered yet.")
        self.waiting = gauge("slam_asr_segments_waiting", "Segments that wait for a batch.")
        self.batch_segments = histogram("slam_asr_batch_segments", "Segments of a batch.", buckets=_BATCH)
        self.batch_seconds = histogram(
            "slam_asr_batch_seconds", "Seconds in which a batch was decoded.", buckets=_SECONDS
        )
        self.close_calls = counter(
            "slam_asr_close_calls",
            "Segments in which rounding may have decided the text: in another batch, the text could differ.",
        )
        self.cut = counter(
            "slam_asr_cut_segments",
            "Segments whose text reached decoding.max_new_tokens, so that its end may be missing.",
        )
