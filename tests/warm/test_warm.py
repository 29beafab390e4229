"""A program that starts warm behaves like one that starts cold.

`sitecustomize` explains warm starts, and the stand-in that the tests see in place of the program.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "SLAM_ASR_WARM" not in os.environ, reason="needs warm starts, which SLAM_ASR_SOAK turns off"
    ),
]

# A script starts warm only if its name ends in `_program.py`; see `sitecustomize._program`.
NAME = "this_program.py"


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a Python program from its source, with its output in pipes."""

    def start(source: str, *arguments: str, **environment: str) -> subprocess.Popen:
        file = tmp_path / NAME
        file.write_text(source)
        return subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | environment,
        )

    return start


def run_both_ways(start, source: str, *arguments: str, **environment: str) -> list[tuple[int, str, str]]:
    """Return the exit code, stdout and stderr of a warm and of a cold start."""
    results = []
    for warmth in ({}, {"SLAM_ASR_WARM": ""}):
        process = start(source, *arguments, **environment, **warmth)
        out, errors = process.communicate(timeout=60)
        results.append((process.returncode, out, errors))
    return results


def test_a_warm_program_is_forked_from_a_process_that_has_imported_torch(start):
    warm, cold = run_both_ways(start, "import sys; print('torch' in sys.modules)")
    assert (warm[1], cold[1]) == ("True\n", "False\n")


@pytest.mark.parametrize(
    "source",
    [
        "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['COLOUR'], __name__)",
        "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)",
        "import sys; sys.exit('a sentence')",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_streams_arguments_environment_and_exit_code_are_the_same(start, source):
    warm, cold = run_both_ways(start, source, "one", "two words", COLOUR="red")
    assert warm == cold


def test_an_exception_is_a_traceback_and_exit_code_1(start):
    warm, cold = run_both_ways(start, "def fail():\n    raise ValueError('wrong')\nfail()")
    assert warm[0] == cold[0] == 1
    assert warm[2].splitlines()[-1] == cold[2].splitlines()[-1] == "ValueError: wrong"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_program(start, number):
    source = (
        "import os, signal, time\n"
        "def end(number, _):\n    os.write(1, b'got %d' % number)\n    raise SystemExit(3)\n"
        f"signal.signal({int(number)}, end)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    process = start(source)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert errors == ""
    assert (process.returncode, out) == (3, f"got {int(number)}")


def test_killing_the_stand_in_kills_the_program(start, tmp_path):
    process = start(
        "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)",
    )
    program = psutil.Process(int(process.stdout.readline()))
    assert program.pid != process.pid
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while program.is_running() and program.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the forked process is still running"
        time.sleep(0.05)


def test_workers_of_multiprocessings_fork_server_start_warm_too(start):
    source = (
        "import multiprocessing, sys\n"
        "def modules(_):\n    return 'torch' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('forkserver').Pool(2) as pool:\n"
        "        print(pool.map(modules, range(2)))"
    )
    warm, cold = run_both_ways(start, source)
    assert (warm[1], cold[1]) == ("[True, True]\n", "[False, False]\n")


def test_other_programs_start_as_usual(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import sys; print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, str(other)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
