"""Limits of what the server accepts, and the errors with which it refuses everything else.

The errors have the form of OpenAI's, so that OpenAI's clients raise the exceptions that their users know.
"""

from dataclasses import dataclass, field

from slam_asr.config.schema import bounded


@dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    requests: int = bounded(64, at_least=1)
    """Maximum number of requests in progress, uploads included. Further requests are refused with 429."""
    megabytes: float = bounded(100.0, above=0)
    """Maximum size of an upload in MB."""
    seconds: float = bounded(1800.0, above=0)
    """Maximum length of a recording in seconds."""
    deadline: float = bounded(300.0, above=0)
    """Maximum time of a request in seconds; after it, the request fails with 504. After SIGTERM, requests in
    progress have the same time to finish."""
    segment: float = bounded(20.0, at_least=1)
    """Maximum length of a segment in seconds, like `--longest` of `slam-asr transcribe`."""
    wait: float = bounded(0.02, at_least=0, at_most=10)
    """Seconds that a batch waits for segments of further requests, counted from the time at which the first
    request was uploaded and divided into segments. Time in which another batch is decoded counts too. A full
    batch does not wait."""

    @property
    def bytes(self) -> int:
        """Maximum size of an upload in bytes."""
        return round(self.megabytes * 1_000_000)


@dataclass(eq=False)
class Refusal(Exception):
    """The refusal of a request."""

    status: int
    """The HTTP status."""
    message: str
    """One sentence for the user."""
    code: str | None = None
    """Name of the error for programs, such as `invalid_api_key`."""
    param: str | None = None
    """Name of the parameter at fault."""
    headers: dict[str, str] = field(default_factory=dict)
    """Additional headers of the response."""

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the response's body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable(why: str) -> Refusal:
    """Return the refusal of a request that may succeed on another server, or on this one a little later."""
    return Refusal(503, why, "unavailable", headers={"Retry-After": "2"})
