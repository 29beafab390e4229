"""Write the lock files: they list every package that slam-asr needs, in the version installed here.

    pip install -e '.[pipelines,small-models,media,serve,registry,test]' 'torch==2.13.0' 'kfp==2.17.0' \
        'model-registry==0.3.14'
    python requirements/lock.py

Run it in an environment with all of these, in which the tests have passed. It uses kfp 2.17.0 instead of
2.17.3, which has the same code but requires a certifi version that not every index has yet. torch's local
version (`+cpu`) is dropped, so that one lock file serves CPU and GPU builds.

The images have separate lists, with hashes: the packages that each stage imports, and their dependencies.
torch has two lists, since its builds for CPU and CUDA are different files, and only the latter needs
NVIDIA's libraries. The hashes are those of the files for Linux on x86-64 and this Python's version. pip's
resolver provides them from the index, without downloading wheels.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slam_asr.steps import IMAGES, STEPS

from imports import third_party

HERE = Path(__file__).parent
LAYERS = {
    "stages.txt": (
        "What the stages need, and what builds the package.",
        ["slam-asr", "setuptools"],
        None,
    ),
    "run.txt": (
        "The stages, the pipelines that run them, what converts the demo's models, ffmpeg, and the server.",
        ["slam-asr[pipelines,small-models,media,serve]"],
        "stages.txt",
    ),
    "test.txt": (
        "All of that, the registry's client, and the tests.",
        ["slam-asr[registry,test]"],
        "run.txt",
    ),
}
"""Each file's purpose, the requirements whose dependencies it lists, and the file that it extends."""

ALSO_STARTED = {"train": ["slam_asr.training.loop"], "serve": ["slam_asr.stages.serve"]}
"""Modules that start as programs of their own, so that no import of a component leads to them."""

ALSO_INCLUDED = {
    "serve": {"python-multipart", "kfp"},
    "publish": {"soundfile", "soxr"},
}
"""What no import of ours leads to: an optional dependency of starlette, and packages of the layer that all
images share."""

STAGES = {
    stage: [
        *(step.module for step in STEPS.values() if stage in (step.name, step.image)),
        *ALSO_STARTED.get(stage, []),
    ]
    for stage in IMAGES
}
"""The modules with which the code in each image begins."""

COMMAND_LINE = {"jsonargparse", "docstring-parser", "setuptools"}
"""Packages that every image also needs: the command line's parsers, and setuptools to install slam-asr."""

OURS = {"components", "pipelines", "slam_asr"}
"""Packages of this project, which are not locked."""


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """Add (name, extra) of `requirement` and of its installed dependencies to `seen`."""
    for extra in ("", *requirement.extras):
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        for text in distribution(requirement.name).requires or []:
            inner = Requirement(text)
            applies = inner.marker is None or inner.marker.evaluate({"extra": extra})
            # The requirements without an extra were added in the first round, for "".
            if applies and (extra == "" or "extra" in str(inner.marker)):
                closure(inner, seen)


def needed(names: set[str]) -> set[str]:
    """Return distributions with their dependencies.

    kfp is included without its dependencies, because a step only runs kfp's executor.
    """
    seen: set[tuple[str, str]] = set()
    for name in names - {"kfp"}:
        closure(Requirement(name), seen)
    return {name for name, _ in seen} | (names & {"kfp"})


def of_stage(stage: str) -> set[str]:
    """Return the distributions in a stage's image, with the dependencies of the torch installed here."""
    known = packages_distributions()
    imported = {canonicalize_name(known[package][0]) for package in third_party(STAGES[stage]).keys() - OURS}
    return needed(imported | COMMAND_LINE | ALSO_INCLUDED.get(stage, set()))


def pinned(name: str) -> str:
    """Return `name==version` of the installed version."""
    return f"{name}=={distribution(name).version.partition('+')[0]}"


def resolve(requirements: list[str], *options: str) -> dict[str, tuple[str, str]]:
    """Return the version and the SHA-256 of each file that pip would install, by the package's name."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            *options,
            "--quiet",
            "--dry-run",
            "--ignore-installed",
        ]
        subprocess.run([*command, "--report", report.name, *requirements], check=True)
        files = json.loads(Path(report.name).read_text(encoding="utf-8"))["install"]
    return {
        canonicalize_name(item["metadata"]["name"]): (
            item["metadata"]["version"].partition("+")[0],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in files
    }


def hashed(names: set[str], wheels: dict[str, tuple[str, str]]) -> list[str]:
    """Return a line with version and hash for each package, sorted by name."""
    return [f"{name}=={wheels[name][0]} --hash=sha256:{wheels[name][1]}" for name in sorted(names)]


def write(file: str, purpose: str, lines: list[str]) -> None:
    """Write one lock file; its first line says what it is for."""
    (HERE / file).parent.mkdir(exist_ok=True)
    (HERE / file).write_text(
        "\n".join([f"# {purpose} Written by requirements/lock.py; do not edit.", *lines]) + "\n",
        encoding="utf-8",
    )
    print(f"{file}: {len(lines)} packages")


def write_images() -> None:
    """Write the lists of the images, one per layer of images/Dockerfile."""
    stages = {stage: of_stage(stage) for stage in STAGES}
    common = set.intersection(*stages.values())
    with_torch = set.intersection(*(names for names in stages.values() if "torch" in names)) - common
    wheels = resolve(
        [pinned(name) for name in sorted(set().union(*stages.values()) - {"torch"})], "--no-deps"
    )
    torch = pinned("torch")
    cpu = resolve([torch], "--no-deps")
    # `--isolated` ignores pip's configuration on this machine, which may select an index without CUDA builds.
    # Dependencies are included here, because only this build depends on NVIDIA's libraries.
    cuda = resolve([torch], "--isolated")
    write(
        "images/common.txt",
        "What every image needs: one layer that all of them share.",
        hashed(common, wheels),
    )
    write("images/torch-none.txt", "No torch: for images whose step does without it.", [])
    write(
        "images/torch-cpu.txt",
        "torch without CUDA, from an index of torch's CPU builds, and what all images with torch need.",
        hashed(with_torch, wheels | cpu),
    )
    write(
        "images/torch-cuda.txt",
        "torch with CUDA, NVIDIA's libraries, and what all images with torch need.",
        hashed(with_torch | (cuda.keys() - needed({"torch"})), wheels | cuda),
    )
    for stage, names in stages.items():
        shared = common | with_torch if "torch" in names else common
        write(
            f"images/{stage}.txt",
            f"What {stage} needs in addition to the layers it shares with other images.",
            hashed(names - shared, wheels),
        )


def main() -> None:
    """Write all lock files."""
    locked: set[str] = {"slam-asr"}
    for file, (purpose, roots, base) in LAYERS.items():
        seen: set[tuple[str, str]] = set()
        for root in roots:
            closure(Requirement(root), seen)
        names = sorted({name for name, _ in seen} - locked)
        locked |= set(names)
        write(file, purpose, [*([f"-r {base}"] if base else []), *(pinned(name) for name in names)])
    write_images()


if __name__ == "__main__":
    main()
