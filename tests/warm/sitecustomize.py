"""Python programs of the tests start warm: a process imports libraries once, then forks for each program.

Importing torch, transformers, DeepSpeed and kfp takes up to eight seconds of a core, and a pipeline on tiny
models starts a dozen programs that import them. With this folder on PYTHONPATH, an interpreter that is about
to run one of this project's programs passes its arguments, environment, folder and standard streams to the
fork server (`fork_server.py`). The interpreter then becomes a stand-in: it passes signals on to the forked
process, and ends as that process ends. If a stand-in is killed, its forked process is killed too, so tests
can treat a stand-in as the program.

All other interpreters start as usual, and so do all interpreters if `SLAM_ASR_WARM` is not set.
"""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_MODULES = ("slam_asr", "pipelines", "demo.models", "kfp.dsl.executor_main", "torch.distributed.run")
_FORK_SERVER = "from multiprocessing.forkserver import main; main("
"""How multiprocessing starts its own fork server. That starts warm too, because it would import torch."""


def _program(words: list[str]) -> list[str] | None:
    """Return the words of a program: `["-m", "slam_asr", "train"]`; None if it starts cold."""
    words = [word for word in words[:2] if word != "-u"] + words[2:]
    if len(words) >= 2 and words[0] == "-m" and (words[1] in _MODULES or words[1].startswith("slam_asr.")):
        return words
    # The interpreter's own flags may come first, such as -B.
    if words[-2:-1] == ["-c"] and words[-1].startswith(_FORK_SERVER):
        return words[-2:]
    script = os.path.basename(words[0]) if words else ""
    # A forked process shares memory pages with the fork server, so programs that measure memory start cold.
    if script.endswith("_program.py") and "memory" not in script:
        return words
    return None


def _connect(address: str) -> "socket.socket":
    """Connect to the fork server. The first stand-in starts it; the others wait for its imports."""
    import fcntl
    import socket
    import subprocess
    import time

    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = time.monotonic() + 300
    started = False
    while time.monotonic() < deadline:
        try:
            server.connect(address)
            return server
        except OSError:
            if not started:
                started = True
                lock = os.open(f"{address}.lock", os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fork_server.py")
                    with open(f"{address}.log", "w", encoding="utf-8") as log:
                        # The fork server inherits the lock, and holds it until it ends.
                        subprocess.Popen(
                            [sys.executable, program, address],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            start_new_session=True,
                            cwd="/",
                            pass_fds=[lock],
                            env=_without_warmth(os.environ),
                        )
                except BlockingIOError:
                    pass
                finally:
                    os.close(lock)
            time.sleep(0.1)
    with open(f"{address}.log", encoding="utf-8") as log:
        raise SystemExit(f"the fork server of the tests does not start: {log.read()}")


def _without_warmth(environment: "os._Environ[str]") -> dict[str, str]:
    # With one thread per library, importing numpy starts no thread. `become` sets the number that a program
    # needs. kfp sets `_KFP_RUNTIME` for a step, and is then imported without its compiler.
    return {k: v for k, v in environment.items() if k not in ("SLAM_ASR_WARM", "_KFP_RUNTIME")} | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _stand_in(address: str, program: list[str]) -> None:
    import array
    import ctypes
    import json
    import signal
    import socket

    server = _connect(address)
    request = {"program": program, "environment": dict(os.environ), "folder": os.getcwd()}
    # multiprocessing's own fork server inherits a socket, and a pipe that closes when its owner ends.
    numbers = program[1].removeprefix(_FORK_SERVER).split(",")[:2] if program[0] == "-c" else []
    inherited = [int(number) for number in numbers]
    # The request may be larger than a packet, so it travels in a file without a name.
    content = os.memfd_create("request")
    os.write(content, json.dumps(request).encode())
    streams = array.array("i", [0, 1, 2, content, *inherited])
    server.sendmsg([b"run"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    process = int(server.recv(64))

    def pass_on(number: int, _: object) -> None:
        # The process may have just ended; then its exit status will arrive.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    for known in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(known) is not signal.SIG_IGN:
            signal.signal(known, pass_on)
    # Readers of the program's output must see its end when the forked process ends, not when this one does.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2, *inherited):
        os.dup2(nothing, stream)
    while (message := server.recv(64)) == b"die with parent":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    status = int(message or signal.SIGKILL)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


_address = os.environ.get("SLAM_ASR_WARM")
if _address:
    _words = _program(sys.orig_argv[1:])
    if _words:
        _stand_in(_address, _words)
