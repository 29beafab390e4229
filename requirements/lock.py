"""Write the lock files: every package that slam-asr needs, at the version installed here.

    pip install -e '.[pipelines,small-models,test]' 'torch==2.13.0' 'kfp==2.17.0'
    python requirements/lock.py

Run it with a Python where all of that is installed, and the tests have passed. kfp 2.17.0 and not
2.17.3: the same code, but the later one asks for a certifi that not every index has yet. torch's
local version (`+cpu`) is dropped, so that one lock serves CPU and GPU builds.

The images have lists of their own, with hashes: for each stage what its code imports, and what that
needs. torch has two, since its builds for CPU and for CUDA are different files, and only the second needs
NVIDIA's libraries. The hashes are those of files for Linux on x86-64 and this Python's version; they
come from pip's own resolver, which asks the index but downloads no wheel.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from imports import third_party
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
LAYERS = {
    "stages.txt": (
        "What the stages need, and what builds the package.",
        ["slam-asr[small-models]", "setuptools"],
        None,
    ),
    "run.txt": ("The stages and the pipelines that run them.", ["slam-asr[pipelines]"], "stages.txt"),
    "test.txt": ("All of that, and the tests.", ["slam-asr[test]"], "run.txt"),
}
"""Each file's purpose, the requirements that it closes over, and the file that it builds on."""

STAGES = {
    "build-manifest": ["components/build_manifest/component.py"],
    "extract-features": ["components/extract_features/component.py"],
    "train": ["components/train/component.py", "slam_asr/training/loop.py"],
    "convert-checkpoint": ["components/convert_checkpoint/component.py"],
    "decode": ["components/decode/component.py", "components/decode/score.py"],
}
"""Where the code begins that runs in a stage's image."""

COMMAND_LINE = {"jsonargparse", "docstring-parser", "setuptools"}
"""What every image needs beside: `slam-asr` reads its options' help from docstrings, and setuptools installs it."""

OURS = {"components", "pipelines", "slam_asr"}


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """Add (name, extra) of `requirement` and of all that it needs here to `seen`."""
    for extra in ("", *requirement.extras):
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        for text in distribution(requirement.name).requires or []:
            inner = Requirement(text)
            wanted = inner.marker is None or inner.marker.evaluate({"extra": extra})
            if wanted and (extra == "" or "extra" in str(inner.marker)):
                closure(inner, seen)


def needed(names: set[str]) -> set[str]:
    """Distributions and all that they need; of kfp only itself, for a step needs its executor alone."""
    seen: set[tuple[str, str]] = set()
    for name in names - {"kfp"}:
        closure(Requirement(name), seen)
    return {name for name, _ in seen} | (names & {"kfp"})


def of_stage(stage: str) -> set[str]:
    """The distributions that a stage's image holds, torch's builds aside."""
    known = packages_distributions()
    imported = {canonicalize_name(known[package][0]) for package in third_party(STAGES[stage]).keys() - OURS}
    return needed(imported | COMMAND_LINE)


def pinned(name: str) -> str:
    """`name==version`, as installed here."""
    return f"{name}=={distribution(name).version.partition('+')[0]}"


def resolve(requirements: list[str], *options: str) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of the file that pip would take, by name."""
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
        chosen = json.loads(Path(report.name).read_text())["install"]
    return {
        canonicalize_name(item["metadata"]["name"]): (
            item["metadata"]["version"].partition("+")[0],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in chosen
    }


def hashed(names: set[str], wheels: dict[str, tuple[str, str]]) -> list[str]:
    """Lines of a list with hashes, sorted by name."""
    return [f"{name}=={wheels[name][0]} --hash=sha256:{wheels[name][1]}" for name in sorted(names)]


def write(file: str, purpose: str, lines: list[str]) -> None:
    """Write one file."""
    (HERE / file).parent.mkdir(exist_ok=True)
    (HERE / file).write_text(
        "\n".join([f"# {purpose} Written by requirements/lock.py; do not edit.", *lines]) + "\n"
    )
    print(f"{file}: {len(lines)} packages")


def write_images() -> None:
    """Write the lists of the images."""
    stages = {stage: of_stage(stage) for stage in STAGES}
    with_torch = [names for names in stages.values() if "torch" in names]
    common = set.intersection(*with_torch) - {"torch"}
    wheels = resolve(
        [pinned(name) for name in sorted(set().union(*stages.values()) - {"torch"})], "--no-deps"
    )
    torch = pinned("torch")
    cpu = resolve([torch], "--no-deps")
    # Without this machine's settings: they may lead to builds without CUDA.
    cuda = resolve([torch], "--isolated")
    write(
        "images/torch-cpu.txt",
        "torch for images without a GPU: from an index of torch's CPU builds.",
        hashed({"torch"}, cpu),
    )
    write(
        "images/torch-cuda.txt",
        "torch with CUDA, and NVIDIA's libraries.",
        hashed({"torch"} | (cuda.keys() - needed({"torch"})), cuda),
    )
    write(
        "images/common.txt",
        "What all images with torch have in common: a layer that they share.",
        hashed(common, wheels),
    )
    for stage, names in stages.items():
        write(
            f"images/{stage}.txt",
            f"What {stage} imports, and what that needs.",
            hashed(names - {"torch"}, wheels),
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
