"""Errors that a user can act on, each told in one sentence.

A `UserError` names what is wrong, where, and what to do. The boundary of a program turns it into
that sentence and exit code 2. Every other exception that escapes is a defect of this project and
keeps its traceback.

The subclasses are for callers: they tell apart what has to change before a retry can succeed.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

EXIT_CODE = 2

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_PERMITTED = {errno.EACCES, errno.EPERM, errno.EROFS}


class UserError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


class InputError(UserError):
    """Data given to a stage is missing, damaged or of the wrong kind: audio, manifests, results of other stages."""


class ConfigurationError(UserError):
    """A recipe, a cluster profile or an option is wrong, or two of them contradict each other."""


class StorageError(UserError):
    """A disk or an object store refuses to read or write."""


class ModelError(UserError):
    """An encoder, LLM, projector or checkpoint cannot be loaded, or does not fit the others."""


class ClusterError(UserError):
    """Kubernetes, Kubeflow or Docker refuses or does not answer."""


def from_os_error(error: OSError) -> UserError | None:
    """The sentence for an operating system's refusal, or None where it is not the user's to mend."""
    where = error.filename or "the output folder"
    if error.errno in _DISK_FULL:
        return UserError(
            f"The disk is full ({os.strerror(error.errno)}) while writing {where}: free some space "
            "or choose another output folder, then run the same command again."
        )
    if error.errno in _NOT_PERMITTED:
        return UserError(
            f"No permission for {where} ({os.strerror(error.errno)}): "
            "choose another path or change its owner."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(
            f"{where} is a file, or lies below one, where a folder is needed: choose another path."
        )
    return None


class Stopped(KeyboardInterrupt):
    """A signal asked for the end, and what was done is kept.

    Args:
        sentence: how far it came, and how to go on.
        code: to exit with: 128 and the signal's number.
    """

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a full disk or a refused permission into one line and exit code 2."""
    try:
        yield
    except UserError as error:
        _exit(str(error), EXIT_CODE)
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        _exit(str(known), EXIT_CODE)
    except KeyboardInterrupt as interruption:
        _exit(
            str(interruption) or "interrupted; run the same command again to go on",
            getattr(interruption, "code", 130),
        )


def _exit(sentence: str, code: int) -> None:
    sys.stdout.flush()
    print(f"slam-asr: error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
