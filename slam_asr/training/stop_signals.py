"""Stops training at the end of a step when a signal asks for it.

Kubernetes sends SIGTERM to a preempted pod and kills it after a grace period of 30 seconds by default. That
is enough for a last checkpoint.
"""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers a signal, which the loop checks at the end of each step."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the last signal, or None."""

    def listen(self) -> None:
        """Install the handlers: from now on a signal no longer ends this process at once."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self.signal = number
