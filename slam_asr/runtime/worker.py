"""Helpers for the processes that a stage starts: they end with the stage, and report failures to it."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from slam_asr import restart
from slam_asr.errors import EXIT_CODE, ConfigurationError, UserError, from_os_error
from slam_asr.storage import write_atomically

FAILURE = "failure.txt"
"""Name of the file to which a process writes the message of its failure."""


PARENT = "SLAM_ASR_PARENT"
"""Environment variable with the id of the process that started this one."""
START = "slam_asr.runtime.start"
"""The module by which a process is started. It calls `die_with_parent`, and then runs another module."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if the parent was killed.

    The kernel does so only if the parent ends after this call. The parent's id is therefore compared
    afterwards: if the parent has ended before the call, this process ends itself.
    """
    if sys.platform == "linux":
        # Python has no function for this system call, so that of the C library is called.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = os.environ.get(PARENT)
    if parent and os.getppid() != int(parent):
        os._exit(EXIT_CODE)


def leave_group(code: int = 0) -> NoReturn:
    """End a process of a distributed job when its work is done.

    All processes wait for each other, and then end without the interpreter's finalisation. During
    finalisation, gloo's threads may still hold tensors. Freeing these tensors needs the GIL and occasionally
    aborts the process (SIGABRT), so that a finished training run would count as failed.

    The process group is not destroyed. To destroy it, gloo waits for its own thread to end, and it has waited
    for ever when another process had closed its connections first. When the process ends, the kernel closes
    the connections, and still delivers what was sent.

    Args:
        code: exit code.
    """
    import torch

    # An error means that another process has already ended. torchrun reports that process.
    with contextlib.suppress(RuntimeError):
        torch.distributed.barrier()
    atexit._run_exitfuncs()  # os._exit does not run these functions
    # The abort is https://github.com/pytorch/pytorch/issues/190489, and the endless wait
    # https://github.com/pytorch/pytorch/issues/75097.
    _exit_at_once(code)


@contextlib.contextmanager
def failures_written_to(
    folder: Path,
    remedy: str = "lower training.positions_per_batch or encoder.batch_seconds, or raise training.zero_stage",
) -> Iterator[None]:
    """If the block raises a `UserError`, write its message to a file for the parent process, and exit.

    A full GPU, and an error of the operating system that the user can resolve, count as a `UserError`. Any
    other exception is a defect: its traceback is printed. The exit code is then `restart.EXIT_CODE` after
    a failure of the GPU that is usually temporary, else 1.

    Args:
        folder: folder of the file `FAILURE`.
        remedy: what the message suggests if the GPU's memory is full.
    """
    try:
        yield
    except Exception as error:
        explained = _explained(error, remedy)
        if explained is None:
            traceback.print_exc()
            _exit_at_once(restart.EXIT_CODE if restart.is_gpu_failure(error) else 1)
        try:
            write_atomically(folder / FAILURE, str(explained))
        except OSError:  # if the disk is full, for example; the parent's message then refers to this output
            print(explained, file=sys.stderr, flush=True)
        _exit_at_once(EXIT_CODE)


def _explained(error: Exception, remedy: str) -> UserError | None:
    """Return the error with a message for the user, or None if the error is a defect."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return ConfigurationError(f"The GPU's memory is full: {remedy}.")
    if isinstance(error, OSError):
        return from_os_error(error)
    return error if isinstance(error, UserError) else None


def _exit_at_once(code: int) -> NoReturn:
    """End this process without the interpreter's finalisation.

    Other processes may be waiting for this one in a collective operation, and cannot end by themselves. The
    launcher ends them as soon as this process has ended, but finalisation could take for ever (see
    `leave_group`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
