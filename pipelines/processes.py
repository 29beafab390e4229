"""Run a step as a process, pass on its output line by line, and end all its processes with the run."""

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import psutil

GRACE = 15.0
"""Seconds that an interrupted step has to end by itself; torchrun needs some to end its workers."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Handle SIGTERM (from a supervisor) and SIGHUP (from a closing terminal) like Ctrl-C.

    By default, these signals would end Python at once and leave the step running. A signal that the caller
    ignores (nohup, a background job) stays ignored.
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


def run(command: list[str], on_line: Callable[[str], None], env: dict[str, str] | None = None) -> int:
    """Run `command` and return its exit code.

    An exception, such as Ctrl-C, ends the command and all processes that it has started.

    Args:
        command: program and arguments.
        on_line: called with each line of stdout and stderr, and with each redrawn progress bar.
        env: environment of the command; default: this process's.
    """
    # The step gets a session of its own. On Ctrl-C, the terminal signals only its foreground group, so only
    # `_end` interrupts the step, once, and this process decides what is still printed.
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
        for line in lines:
            on_line(line)
        return process.wait()
    finally:
        if process.poll() is None:
            _end(process)
        lines.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the step's processes, wait up to `GRACE` seconds, and kill those that remain."""
    # torchrun starts its workers in sessions of their own, which a signal to the group does not reach. They
    # are listed before the signal, because they cannot be found once their parent has ended.
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    try:
        os.killpg(process.pid, signal.SIGINT)
        # Read the output until the end: a full pipe would block a step that still prints.
        process.communicate(timeout=GRACE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, ProcessLookupError):
        pass
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
