"""A step's output arrives line by line with its exit code, and no process survives an interruption."""

import subprocess
import sys
import time

import psutil
import pytest

from pipelines import processes


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_of_both_streams_and_the_exit_code_are_returned():
    lines = []
    code = processes.run(
        python("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"), lines.append
    )
    assert (sorted(lines), code) == (["a\n", "b\n"], 3)


def test_invalid_utf8_does_not_stop_a_step():
    lines = []
    code = processes.run(python(r"import os; os.write(1, b'caf\xe9\n')"), lines.append)
    assert (lines, code) == (["caf\N{REPLACEMENT CHARACTER}\n"], 0)


# The worker is in a session of its own, like those of torchrun, and ignores SIGINT.
STEP_WITH_WORKER = """
import subprocess, sys
worker = subprocess.Popen(
    [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
    ],
    start_new_session=True,
)
print(worker.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then", ["worker.wait()", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); worker.wait()"]
)
def test_interrupted_step_leaves_no_process(monkeypatch, then):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    pids = []

    def interrupt_at_once(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run(python(STEP_WITH_WORKER.format(then=then)), interrupt_at_once)
    assert wait_for_end(pids[0])


def wait_for_end(pid: int) -> bool:
    """Wait until a killed process is gone, or is a zombie whose parent does not reap it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_interrupted_step_may_finish_what_it_prints(tmp_path):
    # The step prints more than fits in a pipe: if nobody read it, the step would block until it is killed.
    code = (
        "import time\n"
        "try: print('on', flush=True); time.sleep(60)\n"
        f"except KeyboardInterrupt: print('x' * 1_000_000, flush=True); open({str(tmp_path / 'done')!r}, 'w')"
    )

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.run(python(code), interrupt)
    assert time.monotonic() - started < processes.GRACE / 2 and (tmp_path / "done").exists()


# kfp runs the steps of a loop in threads, and waits for them when the main thread is interrupted. The signal
# is sent twice, as by the program `timeout`: to the process, and then to the group that the process is in.
STEP_IN_A_THREAD = """
import os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pipelines import processes

code = (
    "import sys, time\\n"
    "try: print('begun', flush=True); time.sleep(60); print('not interrupted')\\n"
    "except KeyboardInterrupt: print('interrupted'); time.sleep(0.1); sys.exit(7)"
)
begun = threading.Event()

def step():
    def on_line(line):
        print(line, end="", flush=True)
        begun.set()
    return processes.run([sys.executable, "-c", code], on_line)

try:
    with processes.interruptible(), ThreadPoolExecutor(1) as executor:
        steps = [executor.submit(step) for _ in range(2)]
        begun.wait()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        steps[0].result()
except KeyboardInterrupt:
    print(steps[0].result(), type(steps[1].exception()).__name__)
"""


@pytest.mark.parametrize("start", [[], ["sh", "-c", 'trap "" INT; exec "$0" "$@"']])
def test_interruption_ends_the_steps_that_run_in_threads(start):
    """The step ends by itself, and the next one does not start, even if a shell ignores SIGINT for its
    jobs."""
    done = subprocess.run([*start, *python(STEP_IN_A_THREAD)], capture_output=True, text=True)
    assert done.stdout == "begun\ninterrupted\n7 KeyboardInterrupt\n", done.stderr


KILLED_BY_ITSELF = """
import os, signal, time
from pipelines import processes
try:
    with processes.interruptible():
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.5)
    print("continued")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_termination_signals_are_interruptions(name):
    done = subprocess.run(python(KILLED_BY_ITSELF.format(name=name)), capture_output=True, text=True)
    assert done.stdout == "interrupted\n", done.stderr


def test_signal_that_the_caller_ignores_stays_ignored():
    shell = ["sh", "-c", 'trap "" HUP; exec "$0" "$@"', *python(KILLED_BY_ITSELF.format(name="SIGHUP"))]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.stdout == "continued\n", done.stderr
