"""Being asked to stop: a preempted pod gets SIGTERM, and some seconds."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers a signal, for the loop to see at the end of a step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """From now on a signal no longer ends this process at once."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self.signal = number
