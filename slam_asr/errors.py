"""Errors that a user can act on, each with a message of one sentence.

A `UserError` names what is wrong, where, and what to do. At the boundary of a program, `exit_on_user_error`
prints the message without a traceback and exits with code 2. An exception that it does not handle is a defect
of this project and is shown with its traceback.

The subclasses are for callers. They distinguish what must change before a retry can succeed.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from slam_asr.cores import limit_threads

EXIT_CODE = 2
ERROR_PREFIX = "slam-asr: error: "
"""Beginning of the line that a program prints before it exits with an error."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a disk that takes no more bytes: it is full, a quota is used up, or a file would be too large."""
_NOT_PERMITTED = {errno.EACCES, errno.EPERM, errno.EROFS}


class UserError(Exception):
    """An error whose message is for the user: what is wrong, where, and what to do, in one sentence.

    It is one line, even if a key or the name of a file that it quotes has line breaks.
    """

    def __str__(self) -> str:
        lines = super().__str__().splitlines()
        return "\\n".join(lines)


class InputError(UserError):
    """A stage's input is missing, damaged or of the wrong kind: audio, manifests, results of other stages."""


class ConfigurationError(UserError):
    """A recipe, a cluster profile or an option is wrong, or two of them contradict each other."""


class StorageError(UserError):
    """A disk or an object store refuses to read or write."""


class ModelError(UserError):
    """An encoder, LLM, projector or checkpoint cannot be loaded, or does not fit the others."""


class ClusterError(UserError):
    """Kubernetes, Kubeflow or Docker refuses or does not answer."""


def from_os_error(error: OSError) -> StorageError | None:
    """Explain an error of the operating system to the user, or return None if the user cannot resolve it."""
    where = error.filename or "the output folder"
    if error.errno in DISK_FULL:
        return StorageError(
            f"The disk is full ({os.strerror(error.errno)}) while writing {where}: free some space "
            "or choose another output folder, then run the same command again."
        )
    if error.errno in _NOT_PERMITTED:
        return StorageError(
            f"No permission for {where} ({os.strerror(error.errno)}): "
            "choose another path or change its owner."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageError(
            f"{where} is a file or lies below a file, but a folder is needed: choose another path."
        )
    return None


class Stopped(KeyboardInterrupt):
    """A signal ended the program, and its progress is saved.

    As a `KeyboardInterrupt`, it passes through `except Exception`.

    Args:
        message: how much is done, and how to resume.
        code: the exit code: 128 plus the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line on stderr, instead of a traceback, after an error that the user can resolve.

    Commands and pipeline steps enter this context before they import torch, so it also limits the threads.
    After a failure of a GPU's driver that is usually temporary, it starts the program again.

    The exit code is 2 after a `UserError`, after the errors that `from_os_error` explains, and if a GPU still
    fails after the last restart. After `Stopped` it is that exception's code, and after Ctrl-C it is 130.
    """
    limit_threads()
    try:
        yield
    except (UserError, OSError) as error:
        explained = from_os_error(error) if isinstance(error, OSError) else error
        if explained is None:
            raise
        _exit(str(explained), EXIT_CODE)
    except RuntimeError as error:
        # Imported here, because most programs never need it.
        from slam_asr.restart import first_line, is_gpu_failure, start_again_after

        if not is_gpu_failure(error):
            raise
        start_again_after(error)
        _exit(
            f"The GPU failed again after each restart ({first_line(error)}): check it with `nvidia-smi`, or "
            "take another one; the same command resumes.",
            EXIT_CODE,
        )
    # This includes `Stopped`, which has an exit code of its own.
    except KeyboardInterrupt as interruption:
        message = str(interruption) or "interrupted; run the same command again to resume"
        _exit(message, getattr(interruption, "code", 130))


def _exit(message: str, code: int) -> NoReturn:
    # Without this flush, in a log of both streams, lines that were printed earlier could appear after the
    # error.
    sys.stdout.flush()
    print(f"{ERROR_PREFIX}{message}", file=sys.stderr, flush=True)
    sys.exit(code)
