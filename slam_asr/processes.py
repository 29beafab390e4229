"""What the processes that a stage starts have in common: they end with it, and leave a user's mistake as a sentence."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from slam_asr.errors import EXIT_CODE, UserError, from_os_error
from slam_asr.storage import write_atomically

FAILURE = "failure.txt"


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, even if that was killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def leave_group(code: int = 0) -> NoReturn:
    """End a process of a distributed job, whose work is done: all together, and without tearing the interpreter down.

    gloo's threads may still hold tensors then, and taking the GIL for them ends in SIGABRT now and then: a finished training would count as a failed one.
    """
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def failures_written_to(
    folder: Path,
    lower: str = "training.positions_per_batch or encoder.batch_seconds, or raise training.zero_stage",
) -> Iterator[None]:
    """Leave a user's mistake as a sentence for the parent, and exit with its code.

    Args:
        folder: for the sentence.
        lower: what to lower where a GPU's memory is full.
    """
    import torch

    try:
        yield
    except UserError as error:
        _leave(folder, error)
    except torch.OutOfMemoryError:
        _leave(folder, UserError(f"The GPU's memory is full: lower {lower}."))
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        _leave(folder, known)


def _leave(folder: Path, error: UserError) -> None:
    try:
        write_atomically(folder / FAILURE, str(error))
    except OSError:  # On a full disk the parent can only refer to this line.
        print(error, file=sys.stderr, flush=True)
    # Other processes may wait in a collective operation; leaving at once lets whoever watches them end them.
    os._exit(EXIT_CODE)
