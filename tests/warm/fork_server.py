"""The fork server: it imports the libraries that the tests' programs need, then forks a process per program.

The first program starts it (see `sitecustomize.py`), and it ends with the test session. It runs no tensor
operation and starts no thread, because a forked process inherits locks but no threads, and could wait
forever.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import re
import runpy
import select
import signal
import socket
import sys
import warnings

IMPORTED = (
    "boto3",
    "deepspeed",
    "jiwer",
    "jsonargparse",
    "kfp",
    "kfp.dsl.executor_main",
    "matplotlib.figure",
    "peft",
    "safetensors.torch",
    "torch.distributed.run",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.whisper.feature_extraction_whisper",
    "transformers.models.whisper.modeling_whisper",
)
"""Modules that take longest to import. Tests of other model families import theirs themselves."""


def main() -> None:
    address = sys.argv[1]
    owner = int(os.environ["SLAM_ASR_WARM_OWNER"])
    # DeepSpeed looks for an accelerator when it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)
    os.environ.pop("DS_ACCELERATOR", None)
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit(
            "an import has started a thread: a program forked from here could wait for it forever"
        )
    # Without this, garbage collection in a forked process would write to every page, and so copy it.
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address + ".starting")
    listening.listen(64)
    os.rename(address + ".starting", address)
    serve(listening, owner)


def serve(listening: socket.socket, owner: int) -> None:
    """Answer requests until the owner's process has ended.

    For each request, this forks a process and reports its exit status. The process that sent the request is
    the stand-in (see `sitecustomize.py`). If it is killed, the forked process is killed too.
    """
    # A signal's arrival wakes the loop; without a handler, SIGCHLD would not.
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stand_ins: dict[int, tuple[int, socket.socket]] = {}
    """The id of each forked process and the socket to its stand-in, keyed by the socket's number."""
    while True:
        ready, _, _ = select.select([listening, awake, *stand_ins], [], [], 2.0)
        if not os.path.exists(f"/proc/{owner}"):
            for number, _ in stand_ins.values():
                os.kill(number, signal.SIGKILL)
            return
        if listening in ready:
            connection, _ = listening.accept()
            number = answer(connection, [listening.fileno(), awake, wake, *stand_ins])
            if number:
                stand_ins[connection.fileno()] = (number, connection)
        if awake in ready:
            os.read(awake, 4096)
            reap(stand_ins)
        for descriptor in [r for r in ready if r in stand_ins]:
            number, connection = stand_ins[descriptor]
            if not connection.recv(1):
                # The stand-in was killed, so its process must end too.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
                connection.close()
                del stand_ins[descriptor]


def reap(stand_ins: dict[int, tuple[int, socket.socket]]) -> None:
    while True:
        try:
            number, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not number:
            return
        for descriptor, (process, connection) in list(stand_ins.items()):
            if process == number:
                with contextlib.suppress(OSError):
                    connection.send(str(status).encode())
                connection.close()
                del stand_ins[descriptor]


def answer(connection: socket.socket, ours: list[int]) -> int:
    """Fork a process for a request; return the process's id, or 0 if the requester has ended."""
    try:
        message, streams, _, _ = socket.recv_fds(connection, 16, 6)
    except OSError:
        message, streams = b"", []
    if not message:
        connection.close()
        return 0
    number = os.fork()
    if number:
        for stream in streams:
            os.close(stream)
        connection.send(str(number).encode())
        return number
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in ours:
        os.close(descriptor)
    become(streams, connection)
    raise AssertionError


def become(streams: list[int], stand_in: socket.socket) -> None:
    """Run the request's program to its end, with the request's streams, environment and folder."""
    for target, stream in enumerate(streams[:3]):
        os.dup2(stream, target)
    with open(streams[3], "rb") as content:
        content.seek(0)
        request = json.load(content)
    program = request["program"]
    for stream in streams[:3]:
        if stream > 2:
            os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    if unbuffered:
        sys.stdout.reconfigure(write_through=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        import torch

        # OpenMP read its variable when torch was imported.
        torch.set_num_threads(int(threads))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[1:1] = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f and f not in sys.path]
    sys.path[0] = request["folder"] if program[0][0] == "-" else os.path.dirname(os.path.abspath(program[0]))
    from slam_asr.runtime import worker as processes

    # This process must end with the parent of its stand-in, but its own parent is the fork server.
    processes.die_with_parent = lambda: stand_in.send(b"die with parent")
    code = 0
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        elif program[0] == "-c":
            sys.argv = ["-c"]
            # The descriptors of multiprocessing's socket and pipe have other numbers in this process.
            start = re.sub(r"main\(\d+, \d+", "main({}, {}".format(*streams[4:]), program[1])
            exec(start, {"__name__": "__main__"})
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, int) or leaving.code is None:
            code = leaving.code or 0
        else:
            print(leaving.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finish(code)


def finish(code: int) -> None:
    """End as an interpreter does: threads first, then exit handlers, then the streams."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
