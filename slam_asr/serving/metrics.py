"""The numbers that Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "slam_asr_requests",
            "Requests for a transcript by status: the HTTP status, that of an error within a stream, or 499 "
            "if the client disconnected early.",
            ["status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "slam_asr_request_seconds",
            "Seconds from the start of a request to its complete answer, for requests with status 200.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.audio_seconds = Counter(
            "slam_asr_audio_seconds",
            "Seconds of audio in the requests with status 200.",
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "slam_asr_requests_in_progress", "Requests that are not answered yet.", registry=self.registry
        )
        self.waiting = Gauge(
            "slam_asr_segments_waiting", "Segments that wait for a batch.", registry=self.registry
        )
        self.batch_segments = Histogram(
            "slam_asr_batch_segments", "Segments of a batch.", buckets=_BATCH, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "slam_asr_batch_seconds",
            "Seconds in which a batch was decoded.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.close_calls = Counter(
            "slam_asr_close_calls",
            "Segments in which rounding may have decided the text: in another batch, the text could differ.",
            registry=self.registry,
        )
        self.cut = Counter(
            "slam_asr_cut_segments",
            "Segments whose text reached decoding.max_new_tokens, so that its end may be missing.",
            registry=self.registry,
        )
