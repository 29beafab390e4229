"""Starts a program again after a failure of a GPU's driver, which usually does not come a second time.

After an error of CUDA, all further calls of the same process fail too, so the program replaces itself; each
stage finds again what it had finished. Kubeflow would not start the program again: since 2.17.0, it starts a
step again only if its pod is lost, drained or preempted. The processes of a training run on one machine are
started again by `training.launch` instead; a training run on several machines is not started again.
"""

import os
import re
import sys
import time

from slam_asr.progress import log_line

GPU_FAILURE = re.compile(
    r"CUDA error: (unspecified launch failure|the launch timed out|uncorrectable|an illegal memory access|"
    r"unknown error|hardware stack error)|"
    r"CU(BLAS|DNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
"""Matches the messages of failures that are usually over when the program starts again."""
EXIT_CODE = os.EX_TEMPFAIL
"""Exit code with which one of several processes of a stage ends after such a failure."""
RESTARTS = "SLAM_ASR_RESTARTS"
"""Environment variable: how often this program has started again."""
PAUSES = (5.0, 20.0, 60.0)
"""Seconds before each restart; after the last one, the failure is final."""


class ProcessFailure(RuntimeError):
    """One of this program's child processes ended with `EXIT_CODE`."""


def is_gpu_failure(error: BaseException) -> bool:
    """Whether a failure is usually over when the program starts again."""
    matches = GPU_FAILURE.search(str(error)) is not None
    return isinstance(error, RuntimeError) and (matches or isinstance(error, ProcessFailure))


def start_again_after(error: BaseException) -> None:
    """Start this program again in the same process. Return if that was already done `len(PAUSES)` times."""
    restarts = int(os.environ.get(RESTARTS) or 0)
    if restarts >= len(PAUSES):
        return
    pause, count = PAUSES[restarts], f"restart {restarts + 1} of {len(PAUSES)}"
    log_line(f"{first_line(error)}. In {pause:g} s, the program starts again ({count})")
    time.sleep(pause)
    os.environ[RESTARTS] = str(restarts + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    return str(error).partition("\n")[0].rstrip(".")
