"""Processes that a stage starts. They end with it, and write a `UserError`'s message to a file."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from slam_asr.errors import EXIT_CODE, ConfigurationError, UserError, from_os_error
from slam_asr.storage import write_atomically

FAILURE = "failure.txt"
"""Name of the file to which a process writes the message of its failure."""


PARENT = "SLAM_ASR_PARENT"
"""Environment variable: the id of the process that started this one."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if the parent was killed.

    The kernel signals only what happens after this call. A parent that was killed while this process was
    still importing its modules would leave it waiting for others for ever, so that is checked afterwards.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = os.environ.get(PARENT)
    if parent and os.getppid() != int(parent):
        os._exit(EXIT_CODE)


def leave_group(code: int = 0) -> NoReturn:
    """End a process of a distributed job when its work is done.

    All processes end together and skip the interpreter's finalisation. gloo's threads may still hold tensors
    at that point; freeing them needs the GIL and occasionally aborts the process (SIGABRT), so that a
    finished training would count as failed.

    Args:
        code: exit code.
    """
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # os._exit does not run these functions
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def failures_written_to(
    folder: Path,
    remedy: str = "lower training.positions_per_batch or encoder.batch_seconds, or raise training.zero_stage",
) -> Iterator[None]:
    """After a `UserError` in the block, write its message to a file for the parent process, and exit.

    A full GPU, and an error of the operating system that the user can resolve, count as a `UserError`.

    Args:
        folder: folder of the file.
        remedy: what the message suggests if the GPU's memory is full.
    """
    import torch

    try:
        yield
    except UserError as error:
        _exit_with(folder, error)
    except torch.OutOfMemoryError:
        _exit_with(folder, ConfigurationError(f"The GPU's memory is full: {remedy}."))
    except OSError as error:
        explained = from_os_error(error)
        if explained is None:
            raise
        _exit_with(folder, explained)


def _exit_with(folder: Path, error: UserError) -> None:
    try:
        write_atomically(folder / FAILURE, str(error))
    except OSError:  # the disk is full: the parent's message then refers to this output
        print(error, file=sys.stderr, flush=True)
    # Other processes may be waiting in a collective operation. They cannot end by themselves: exit at once,
    # so that the launcher notices and ends them.
    os._exit(EXIT_CODE)
