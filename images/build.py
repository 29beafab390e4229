"""`make images`: build the five images, push them, and write down what `python -m pipelines compile --images` reads.

    python images/build.py --registry registry.example/team --tag 0.1.0 --push

Docker's own command does the work, so its cache, its credentials and its remote engines are used as ever.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build-manifest", "extract-features", "train", "convert-checkpoint", "decode")
WRITTEN = ROOT / "build" / "images.yaml"


class Refused(Exception):
    """What the user has to mend, in one sentence."""


def main() -> int:
    """Build, and push where asked → the exit code."""
    options = _options()
    try:
        stages = _stages(options.stages)
        _require_index(stages, options)
        _require_engine()
        names = {
            stage: f"{options.registry.rstrip('/')}/{stage}:{options.tag}".lstrip("/") for stage in stages
        }
        for stage, name in names.items():
            _build(stage, name, options)
        named = {stage: _push(name) for stage, name in names.items()} if options.push else names
    except Refused as refusal:
        print(f"images: error: {refusal}", file=sys.stderr)
        return 2
    for stage, name in names.items():
        print(f"{stage:<20} {_size(name):>8} MB  {named[stage]}")
    _write(named)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the images of all stages.")
    parser.add_argument(
        "--registry", default="slam-asr", help="what stands before the stage in an image's name"
    )
    parser.add_argument(
        "--tag", default=_version(), help="best one that is never moved (default: the version)"
    )
    parser.add_argument("--push", action="store_true", help="push, and write down digests instead of tags")
    parser.add_argument("--stages", default="", help="some of them, separated by blanks (default: all)")
    parser.add_argument("--base-image", default="", help="instead of the Dockerfiles' own")
    parser.add_argument(
        "--torch",
        default="",
        choices=("", "cpu", "cuda"),
        help="one build of torch for all, instead of CUDA where a GPU is used",
    )
    parser.add_argument(
        "--pip-args", default="", help="options for pip, such as an index of torch's CPU builds"
    )
    parser.add_argument(
        "--build-args", default="", help="more options for `docker build`, such as --network host"
    )
    return parser.parse_args()


def _stages(named: str) -> list[str]:
    unknown = [stage for stage in named.split() if stage not in STAGES]
    if unknown:
        raise Refused(f"there is no stage {unknown[0]}: STAGES may name {', '.join(STAGES)}.")
    return named.split() or list(STAGES)


def _require_index(stages: list[str], options: argparse.Namespace) -> None:
    """Say before the first build what would else show in the fourth."""
    without_cuda = (
        stages
        if options.torch == "cpu"
        else [s for s in stages if s == "convert-checkpoint" and not options.torch]
    )
    if [s for s in without_cuda if s != "build-manifest"] and not options.pip_args and not options.base_image:
        raise Refused(
            f"{without_cuda[-1]} takes torch's build without CUDA, which has an index of its own: name it with PIP_ARGS=\"--extra-index-url …\" (torch's "
            "installation page has the address), or take TORCH=cuda."
        )


def _require_engine() -> None:
    if not shutil.which("docker"):
        raise Refused(
            "there is no docker command: install Docker, or a program that answers to that name, such as Podman's."
        )
    answer = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True
    )
    if answer.returncode:
        raise Refused(
            f"the Docker engine does not answer ({_last_line(answer.stderr)}): start it, or set DOCKER_HOST."
        )


def _build(stage: str, name: str, options: argparse.Namespace) -> None:
    print(f"building {name}", flush=True)
    arguments = {"BASE_IMAGE": options.base_image, "PIP_ARGS": options.pip_args, "GIT_COMMIT": _commit()}
    if stage != "build-manifest":
        arguments["TORCH"] = options.torch
    given = [part for key, value in arguments.items() if value for part in ("--build-arg", f"{key}={value}")]
    command = [
        "docker",
        "build",
        "--file",
        f"images/{stage}/Dockerfile",
        "--tag",
        name,
        *given,
        *shlex.split(options.build_args),
        ".",
    ]
    # The legacy builder is the one that every engine has.
    environment = {"DOCKER_BUILDKIT": "0", **os.environ}
    build = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in build.stdout:
        lines.append(line)
        if line.startswith("Step ") or "ERROR" in line:
            print(f"  {line.rstrip()}", flush=True)
    if build.wait():
        hint = ""
        if "torch-cpu.txt" in "".join(lines[-8:]) + "".join(
            line for line in lines if "ERROR" in line
        ) or "torch==2" in "".join(lines[-8:]):
            hint = "; torch's CPU builds come from an index of their own: name it with PIP_ARGS, or build with TORCH=cuda"
        raise Refused(f"{name} was not built ({_last_line(''.join(lines))}){hint}.")


def _push(name: str) -> str:
    """Push → the name with the digest that the registry gave."""
    print(f"pushing {name}", flush=True)
    pushed = subprocess.run(["docker", "push", name], capture_output=True, text=True)
    if pushed.returncode:
        raise Refused(
            f"{name} was not pushed ({_last_line(pushed.stderr)}): `docker login` for its registry, or check REGISTRY."
        )
    digests = json.loads(
        subprocess.run(
            ["docker", "inspect", "--format", "{{json .RepoDigests}}", name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    # Docker leaves its own registry's name out.
    repository = name.rpartition(":")[0].removeprefix("docker.io/").removeprefix("library/")
    digest = next((d.partition("@")[2] for d in digests if d.partition("@")[0] == repository), None)
    if digest is None:
        raise Refused(
            f"{name} was pushed, but Docker does not say its digest ({', '.join(digests) or 'none'}): write build/images.yaml by hand."
        )
    return f"{name.rpartition(':')[0]}@{digest}"


def _size(name: str) -> str:
    size = subprocess.run(
        ["docker", "inspect", "--format", "{{.Size}}", name], check=True, capture_output=True, text=True
    ).stdout
    return f"{int(size) / 1e6:,.0f}"


def _write(named: dict[str, str]) -> None:
    before = {}
    if WRITTEN.is_file():
        before = dict(
            line.split(": ", 1)
            for line in WRITTEN.read_text().splitlines()
            if ": " in line and not line.startswith("#")
        )
    WRITTEN.parent.mkdir(exist_ok=True)
    lines = [f"{stage}: {name}" for stage, name in ({**before, **named}).items()]
    WRITTEN.write_text(
        "\n".join(
            [
                "# The image of each stage, for `python -m pipelines compile --images build/images.yaml`.",
                *lines,
            ]
        )
        + "\n"
    )
    print(f"written: {WRITTEN.relative_to(ROOT)}")


def _commit() -> str:
    """The checkout's commit, with + where files differ from it; empty without git."""
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip()


def _version() -> str:
    text = (ROOT / "slam_asr" / "__init__.py").read_text()
    return text.split('__version__ = "')[1].split('"')[0]


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
