"""Downloads models from the model hub, and finds them in the hub's own cache."""

import shutil
from pathlib import Path

from slam_asr.pretrained.model_files import needed_files
from slam_asr.progress import log_line

HUB_TIMEOUT = 3.0
"""Seconds to wait for the hub to answer whether it has a model. Short, because clusters often block it."""


class Unavailable(Exception):
    """A source does not have the model. The message is a clause that states the reason."""


def cached_snapshot(name: str) -> Path | None:
    """Return the model's snapshot in `huggingface_hub`'s cache, complete or not, or None if it has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        return None


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
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT)
        needed = needed_files([file.rfilename for file in info.siblings or []], weights)
        log_line(f"fetching {name}{'' if weights else ' (configuration)'} from the hub")
        snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=needed)
    # The order matters, because each of these is a subclass of the next: GatedRepoError,
    # RepositoryNotFoundError, HfHubHTTPError, HTTPError.
    except OfflineModeIsEnabled:
        raise Unavailable("the hub is switched off (HF_HUB_OFFLINE)") from None
    except GatedRepoError:
        raise Unavailable(
            "the hub requires that its licence is accepted first (log in and open the model's page)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise Unavailable(
            "the hub has no model of that name (check the spelling, or log in if it is private)"
        ) from None
    except HfHubHTTPError as error:
        raise Unavailable(f"the hub answers {error.response.status_code}") from None
    # huggingface_hub's HTTPError is the HTTP library's own class, which covers every failed connection.
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise Unavailable(f"the hub cannot be reached ({type(error).__name__})") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
