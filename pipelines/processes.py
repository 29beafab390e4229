"""Runs a step as a process, passes on its output line by line, and ends all its processes with the run."""

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import psutil

GRACE = 15.0
"""Seconds that an interrupted step has to end by itself; torchrun needs some to end its workers."""
_ONE_SIGNAL = 1.0
"""Seconds after a signal in which another one is ignored. `timeout` signals a process, and then its group,
so the process gets two."""
_interrupted = threading.Event()
_stoppers: set[Callable[[], None]] = set()
"""Functions that end the steps that run outside the main thread."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Handle SIGTERM (from a supervisor) and SIGHUP (from a closing terminal) like Ctrl-C.

    By default, these signals would end Python at once and leave the step running. A signal that the caller
    ignores (nohup, a background job) stays ignored.
    """
    last = -_ONE_SIGNAL

    def interrupt(*_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _ONE_SIGNAL:
            return
        last = now
        _interrupted.set()
        for stop in list(_stoppers):
            threading.Thread(target=stop).start()
        raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
        elif number == signal.SIGINT:
            # Child processes inherit an ignored signal, but not a handler. A shell starts its background jobs
            # with SIGINT ignored; their steps would ignore it too, and could not be interrupted.
            signal.signal(number, lambda *_: None)
    _interrupted.clear()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopped_on_interruption(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in a thread of its own when a signal interrupts the run during this block.

    kfp runs the steps of a loop in threads. A signal raises KeyboardInterrupt only in the main thread, which
    then waits until these threads have ended, so `stop` has to end their steps. In the main thread, where the
    exception itself ends the step, this does nothing.

    Raises:
        KeyboardInterrupt: the run has been interrupted already.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    _stoppers.add(stop)
    try:
        # Checked after `stop` is registered, so that no signal is missed: an earlier one is found here, and a
        # later one calls `stop`.
        if _interrupted.is_set():
            raise KeyboardInterrupt
        yield
    finally:
        _stoppers.discard(stop)


def run(command: list[str], on_line: Callable[[str], None], env: dict[str, str] | None = None) -> int:
    """Run `command` and return its exit code.

    An exception, such as Ctrl-C, ends the command and all processes that it has started.

    Args:
        command: program and arguments.
        on_line: called with each line of stdout and stderr, and with each redrawn progress bar.
        env: environment of the command; default: this process's.
    """
    # The step gets a session of its own. On Ctrl-C, the terminal signals only its foreground group, so only
    # `_interrupt` interrupts the step, once, and this process decides what is still printed.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    assert process.stdout is not None, "stdout is a pipe"
    # Line ends are not translated: a progress bar ends in a carriage return and is redrawn over itself.
    lines = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
    try:
        with stopped_on_interruption(lambda: _interrupt(process, process.wait)):
            for line in lines:
                on_line(line)
            return process.wait()
    finally:
        if process.poll() is None:
            # The output is read until the end: a full pipe would block a step that still prints.
            _interrupt(process, process.communicate)
        lines.close()


def decoded_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Split a log that arrives in chunks into lines, without their line breaks.

    A chunk may end within a line, or within a UTF-8 character, so only complete lines are decoded.
    """
    rest = b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in complete)
    if rest:
        yield rest.decode("utf-8", "replace")


def _interrupt(process: subprocess.Popen[bytes], wait: Callable[..., object]) -> None:
    """Interrupt the step's processes, wait up to `GRACE` seconds, and kill those that remain.

    Args:
        process: the step.
        wait: waits until the step has ended; takes a `timeout` in seconds.
    """
    # torchrun starts its workers in sessions of their own, which a signal to the group does not reach. They
    # are listed before the signal, because they cannot be found once their parent has ended.
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    try:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            wait(timeout=GRACE)
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
