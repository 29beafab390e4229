"""Downloads models from the model hub, and finds them in the hub's own cache."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from slam_asr.pretrained.model_files import is_complete, needed_files
from slam_asr.progress import log_line

HUB_TIMEOUT = 3.0
"""Seconds to wait for the hub to answer. The time is short, because clusters often block the hub."""
FIRST_PAUSES = (1.0, 2.0)
"""Seconds before further attempts if the hub cannot be reached: a new pod's network may not be ready yet."""
PAUSES = (1.0, 5.0, 15.0, 30.0, 60.0)
"""Seconds before further attempts if the hub answers that it is busy, or if a download breaks off."""
_TEMPORARY = (429, 500, 502, 503, 504)
"""HTTP's codes for an overloaded or restarting server."""

T = TypeVar("T")


class Unavailable(Exception):
    """A source cannot supply the model. The message is a clause that states the reason."""


def cached_snapshot(name: str) -> Path | None:
    """Return the model's snapshot in `huggingface_hub`'s cache, or None if it is missing or incomplete."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
    except (OSError, errors.HFValidationError):
        return None
    # `huggingface_hub` itself can only check it if it has a list of the model's files.
    return snapshot if is_complete(snapshot) else None


def from_hub(name: str, folder: Path, weights: bool = True) -> None:
    """Download a model's files from the hub into `folder`, resuming an interrupted download there.

    Args:
        name: the model's name on the hub.
        folder: the folder for the files.
        weights: whether to download the weights too. If False, only small files such as the configuration and
            the tokenizer are downloaded.

    Raises:
        Unavailable: the hub cannot be reached, does not have the model, or refuses access to it.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = _repeated(lambda: HfApi().model_info(name, timeout=HUB_TIMEOUT), name, FIRST_PAUSES)
        needed = needed_files([file.rfilename for file in info.siblings or []], weights)
        log_line(f"fetching {name}{'' if weights else ' (configuration)'} from the hub")

        def fetch() -> None:
            """Fetch the files that are missing, and continue with those that are incomplete."""
            snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=needed)
            # If the hub does not answer, `snapshot_download` returns the incomplete folder without an error.
            if not all((folder / file).is_file() for file in needed):
                raise errors.LocalEntryNotFoundError(name)

        _repeated(fetch, name, PAUSES)
    # The order matters, because each of these is a subclass of the next: GatedRepoError,
    # RepositoryNotFoundError, HfHubHTTPError, HTTPError.
    except errors.OfflineModeIsEnabled:
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
    except errors.GatedRepoError:
        reason = "the hub requires that its licence is accepted first (log in and open the model's page)"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = "the hub has no model of that name (check the spelling, or log in if it is private)"
    except errors.HfHubHTTPError as error:
        reason = f"the hub answers {error.response.status_code}"
    # huggingface_hub's HTTPError is the HTTP library's own class, which covers every failed connection.
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return
    raise Unavailable(reason)


def _repeated(call: Callable[[], T], name: str, pauses_if_unreachable: Sequence[float]) -> T:
    """Call the hub, and repeat the call after failures that may be temporary.

    If the last attempt fails too, its exception is raised.

    Args:
        call: may be called many times.
        name: the model's name on the hub, for the log.
        pauses_if_unreachable: seconds before each further attempt if the hub cannot be reached.
    """
    from huggingface_hub import errors

    attempts = 0
    while True:
        try:
            return call()
        except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
            pauses, failure = pauses_if_unreachable, type(error).__name__
            if isinstance(error, errors.HfHubHTTPError):
                pauses = PAUSES if error.response.status_code in _TEMPORARY else ()
            if attempts >= len(pauses):
                raise
        log_line(f"{name}: the hub fails ({failure}); another attempt in {pauses[attempts]:g} s")
        time.sleep(pauses[attempts])
        attempts += 1
