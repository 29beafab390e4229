"""A step's process: in a group of its own, heard line by line, and gone when the run is."""

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import psutil

GRACE = 15.0
"""Seconds that an interrupted step gets to end by itself; torchrun needs some to end its workers."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat the end that a supervisor (SIGTERM) or a closing terminal (SIGHUP) asks for like Ctrl-C.

    A step has to be ended with the run, and Python would leave at once. A signal that the caller
    has ignored (nohup, a background job) stays ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: list[str], hear: Callable[[str], None], env: dict[str, str] | None = None) -> int:
    """Run `command`, pass each line of its output, and each redrawn bar, to `hear`, and give its exit code.

    Left by an exception, such as Ctrl-C, it ends the command and all processes that it has started.
    """
    # A group of its own: on Ctrl-C the terminal signals the foreground group only, so that the
    # step hears of it from us, once, and we decide what is still printed.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    # Line ends stay as they are: a progress bar is redrawn behind a carriage return.
    lines = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
    try:
        for line in lines:
            hear(line)
        return process.wait()
    finally:
        if process.poll() is None:
            _end(process)
        lines.close()


def _end(process: subprocess.Popen) -> None:
    """Ask the step's processes to end, wait a while, and kill what is left."""
    # Workers of torchrun are in sessions of their own: the group's signal does not reach them.
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    try:
        os.killpg(process.pid, signal.SIGINT)
        # Read on until all are gone: a full pipe would keep them from ending.
        process.communicate(timeout=GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, ProcessLookupError):
        pass
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
