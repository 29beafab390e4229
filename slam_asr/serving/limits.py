"""What the server accepts, and the errors with which it refuses the rest.

The errors have the form of OpenAI's, so that its clients raise the exceptions that their users know.
"""

from dataclasses import dataclass

from slam_asr.config.schema import bounded


@dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    requests: int = bounded(64, at_least=1)
    """Requests in progress at a time, uploads included. More are refused with 429."""
    megabytes: float = bounded(100.0, above=0)
    """Largest upload."""
    seconds: float = bounded(1800.0, above=0)
    """Longest recording."""
    deadline: float = bounded(300.0, above=0)
    """Seconds from the start of a request until it is given up with 504. After SIGTERM, requests in progress
    get as long to finish."""
    segment: float = bounded(20.0, at_least=1)
    """Maximum length of a segment in seconds, as `--longest` of `slam-asr transcribe`."""
    wait: float = bounded(0.02, at_least=0, at_most=10)
    """Seconds that a batch waits for segments of more requests, counted from the arrival of its first one,
    also while another batch is decoded. It starts earlier if it is full."""

    @property
    def bytes(self) -> int:
        """Largest upload in bytes."""
        return round(self.megabytes * 1_000_000)


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: the HTTP status.
        message: one sentence for the user.
        code: what programs compare, such as `invalid_api_key`.
        param: the parameter at fault.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The response's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable(why: str) -> Refusal:
    """Return the refusal of a request that may succeed on another server, or here a little later."""
    return Refusal(503, why, "unavailable", headers={"Retry-After": "2"})


def too_late(deadline: float) -> Refusal:
    """Return the refusal of a request that was not finished within `deadline` seconds."""
    return Refusal(
        504,
        f"The transcript was not finished within {deadline:g} s: send a shorter recording, or try again "
        "when the server is less busy.",
        "deadline_exceeded",
        # Repeating it at once, as OpenAI's clients do after a 5xx, would only add to the load.
        headers={"x-should-retry": "false"},
    )
