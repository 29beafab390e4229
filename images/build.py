"""`make images`: build the images of the steps and the server, push them, and list them in build/images.yaml.

    python images/build.py --registry registry.example/team --tag 0.1.0 --push

`python -m pipelines compile --images` reads that list. The `docker` command does the work, so its cache,
credentials and remote engines work as usual. This program needs no package beyond Python's own.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slam_asr import __version__  # noqa: E402 - the package need not be installed here
from slam_asr.steps import IMAGES  # noqa: E402
from slam_asr.version import commit_of_checkout  # noqa: E402

IMAGE_LIST = ROOT / "build" / "images.yaml"
LOADERS = {"kind": ("load", "docker-image"), "minikube": ("image", "load")}
"""Arguments with which each tool loads an image into its cluster. KIND_CLUSTER_NAME or MINIKUBE_PROFILE
selects a cluster other than the default, as the tool documents."""
AT_ONCE = 3
"""Number of images that are built at the same time. pip uses one core per image."""


class BuildError(Exception):
    """An error that the user can fix. Its message is one sentence: what is wrong, and what to do."""


def main() -> int:
    """Build the images, push them if requested, and return the exit code."""
    options = _options()
    try:
        stages = _stages(options.stages)
        _require_index(stages, options)
        _require_engine()
        names = {
            stage: f"{options.registry.rstrip('/')}/{stage}:{options.tag}".lstrip("/") for stage in stages
        }
        _build_all(names, options)
        references = {stage: _push(name) for stage, name in names.items()} if options.push else names
        if options.load:
            _load(options.load, list(names.values()))
        for stage, name in names.items():
            megabytes = int(_inspect(name, "{{.Size}}")) / 1e6
            print(f"{stage:<20} {megabytes:>8,.0f} MB  {references[stage]}")
    except BuildError as error:
        print(f"images: error: {error}", file=sys.stderr)
        return 2
    _write_list(references)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the images of all stages.")
    parser.add_argument("--registry", default="slam-asr", help="prefix of the image names, before /STAGE")
    parser.add_argument(
        "--tag",
        default=__version__,
        help="tag of the images; do not reuse one for other content (default: the version)",
    )
    parser.add_argument(
        "--push", action="store_true", help="push the images, and list their digests instead of tags"
    )
    parser.add_argument(
        "--load",
        default="",
        choices=("", *LOADERS),
        help="load the images into the nodes of a throwaway cluster, which then needs no registry",
    )
    parser.add_argument("--stages", default="", help="stages to build, separated by spaces (default: all)")
    parser.add_argument("--base-image", default="", help="base image instead of the one in images/Dockerfile")
    parser.add_argument(
        "--torch",
        default="",
        choices=("", "cpu", "cuda"),
        help="build of torch for all images that contain it (default: CUDA for the stages that use GPUs, "
        "CPU for the others)",
    )
    parser.add_argument(
        "--pip-args", default="", help="options for pip, such as an index of torch's CPU builds"
    )
    parser.add_argument(
        "--build-args", default="", help="more options for `docker build`, such as --network host"
    )
    return parser.parse_args()


def _stages(names: str) -> list[str]:
    unknown = [stage for stage in names.split() if stage not in IMAGES]
    if unknown:
        raise BuildError(f"there is no stage {unknown[0]}: STAGES may name {', '.join(IMAGES)}.")
    return names.split() or list(IMAGES)


def _require_index(stages: list[str], options: argparse.Namespace) -> None:
    """Check that pip gets an index with torch's CPU builds, if they are needed.

    Without this check, a missing index would fail the build only after other images are built.
    """
    without_cuda = [stage for stage in stages if _torch_of(stage, options) == "cpu"]
    if without_cuda and not options.pip_args and not options.base_image:
        raise BuildError(
            f"{without_cuda[-1]} uses torch's build without CUDA, which has an index of its own: "
            'name it with PIP_ARGS="--extra-index-url …" (torch\'s installation page has the address), '
            "or use TORCH=cuda."
        )


def _torch_of(stage: str, options: argparse.Namespace) -> str:
    """Return the build of torch in a stage's image: the requested one, if the stage needs torch at all."""
    build = IMAGES[stage]
    return options.torch or build if build != "none" else build


def _require_engine() -> None:
    _require_program("docker", "install Docker, or a compatible program such as Podman's")
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    _output_of(command, "the Docker engine does not answer", "start it, or set DOCKER_HOST")


def _require_program(name: str, remedy: str) -> None:
    if not shutil.which(name):
        raise BuildError(f"there is no {name} command: {remedy}.")


def _output_of(command: list[str], failure: str, remedy: str) -> str:
    """Run a command and return its output; if it fails, raise an error with the last line of its messages."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise BuildError(f"{failure} ({_last_line(done.stderr)}): {remedy}.")
    return done.stdout


def _inspect(name: str, template: str) -> str:
    """Return what Docker knows about an image, in the form of a Go template."""
    command = ["docker", "inspect", "--format", template, name]
    return _output_of(command, f"{name} cannot be inspected", "check that the Docker engine runs")


def _build_all(names: dict[str, str], options: argparse.Namespace) -> None:
    """Build the images, `AT_ONCE` of them at a time.

    Images with the same build of torch share their first and largest layers. So one image of each kind is
    built before the others, which then take these layers from Docker's cache.
    """
    firsts = {_torch_of(stage, options): stage for stage in reversed(names)}.values()
    for stage in firsts:
        _build(stage, names[stage], options)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        builds = [pool.submit(_build, stage, names[stage], options) for stage in names if stage not in firsts]
        try:
            for build in as_completed(builds):
                build.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build(stage: str, name: str, options: argparse.Namespace) -> None:
    """Build an image. The lines of its log begin with the stage's name, since several builds may run."""
    print(f"building {name}\n", end="", flush=True)
    arguments = {
        "STAGE": stage,
        "TORCH": _torch_of(stage, options),
        "BASE_IMAGE": options.base_image,
        "PIP_ARGS": options.pip_args,
        "GIT_COMMIT": commit_of_checkout(),
    }
    command = ["docker", "build", "--file", "images/Dockerfile", "--tag", name]
    command += [f"--build-arg={key}={value}" for key, value in arguments.items() if value]
    command += [*shlex.split(options.build_args), "."]
    # The legacy builder is the default, because every engine has it and BuildKit is an optional plugin. The
    # user's environment takes precedence, so it can select BuildKit.
    environment = {"DOCKER_BUILDKIT": "0", **os.environ}
    build = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert build.stdout is not None, "stdout is a pipe"
    lines = []
    for line in build.stdout:
        lines.append(line)
        if line.startswith("Step ") or "ERROR" in line:
            # One write per line: `print` would write the line break separately, after another build's line.
            print(f"  {stage}: {line.rstrip()}\n", end="", flush=True)
    if build.wait():
        end, errors = "".join(lines[-8:]), "".join(line for line in lines if "ERROR" in line)
        hint = ""
        if "torch-cpu.txt" in end + errors or "torch==2" in end:
            hint = (
                "; torch's CPU builds come from an index of their own: "
                "name it with PIP_ARGS, or build with TORCH=cuda"
            )
        raise BuildError(f"{name} was not built ({_last_line(''.join(lines))}){hint}.")


def _push(name: str) -> str:
    """Push an image and return its name with the digest from the registry."""
    print(f"pushing {name}", flush=True)
    remedy = "`docker login` to its registry, or check REGISTRY"
    _output_of(["docker", "push", name], f"{name} was not pushed", remedy)
    digests = json.loads(_inspect(name, "{{json .RepoDigests}}"))
    # Docker omits the name of its own registry in the digests that it reports.
    repository = name.rpartition(":")[0].removeprefix("docker.io/").removeprefix("library/")
    digest = next((d.partition("@")[2] for d in digests if d.partition("@")[0] == repository), None)
    if digest is None:
        raise BuildError(
            f"{name} was pushed, but Docker does not report its digest ({', '.join(digests) or 'none'}): "
            "write build/images.yaml by hand."
        )
    return f"{name.rpartition(':')[0]}@{digest}"


def _load(tool: str, names: list[str]) -> None:
    """Load images into the nodes of a cluster that runs on this machine."""
    _require_program(tool, "install it, or push the images to a registry")
    for name in names:
        print(f"loading {name} into the nodes", flush=True)
        remedy = f"check that the {tool} cluster runs"
        _output_of([tool, *LOADERS[tool], name], f"{name} was not loaded", remedy)


def _write_list(references: dict[str, str]) -> None:
    """Update build/images.yaml; the lines of stages that were not built this time stay unchanged."""
    lines = IMAGE_LIST.read_text(encoding="utf-8").splitlines() if IMAGE_LIST.is_file() else []
    before = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))
    heading = "# The image of each stage, for `python -m pipelines compile --images build/images.yaml`."
    entries = (f"{stage}: {name}" for stage, name in (before | references).items())
    IMAGE_LIST.parent.mkdir(exist_ok=True)
    IMAGE_LIST.write_text("\n".join([heading, *entries, ""]), encoding="utf-8")
    print(f"wrote {IMAGE_LIST.relative_to(ROOT)}")


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
