"""Images follow one pattern, contain exactly what their stage imports, and work for any user."""

import json
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from components import STAGES
from slam_asr import __version__
from tests.engine import BASE, NoEngine, install

CHECKOUT = Path(__file__).resolve().parents[2]
LISTS = CHECKOUT / "requirements" / "images"
sys.path[:0] = [str(CHECKOUT / "requirements"), str(CHECKOUT / "images")]

import build  # noqa: E402 - images/ is not a package
import lock  # noqa: E402 - requirements/ is not a package
from imports import third_party  # noqa: E402

WITHOUT_TORCH = "build-manifest"


def dockerfile(stage: str) -> str:
    return (CHECKOUT / "images" / stage / "Dockerfile").read_text()


def listed(file: str) -> dict[str, str]:
    """Parse a list of packages: hash by name."""
    lines = [line for line in (LISTS / file).read_text().splitlines() if not line.startswith("#")]
    return {re.match(r"[\w.-]+", line)[0]: line.partition("--hash=sha256:")[2] for line in lines}


def test_an_image_is_built_for_every_stage():
    assert build.STAGES == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_dockerfile_follows_the_pattern(stage):
    """All five are the same text, except for the stage's name, torch and the GPU."""

    def normalised(text: str, name: str) -> list[str]:
        text = text.replace(name, "STAGE").replace("TORCH=cpu", "TORCH=cuda")
        lines = [line for line in text.splitlines() if not line.startswith("# The image of the stage")]
        return [line for line in lines if "NVIDIA" not in line]

    pattern = normalised(dockerfile("train"), "train")
    ours = normalised(dockerfile(stage), stage)
    if stage == WITHOUT_TORCH:
        left_out = [line for line in pattern if line not in ours]
        assert all(
            "torch" in line.lower() or "common.txt" in line or line.startswith("# cuda:") for line in left_out
        ), left_out
        assert [line for line in ours if line not in pattern] == []
    else:
        assert ours == pattern
    assert "ENTRYPOINT [" not in dockerfile(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_every_installed_package_is_pinned_by_version_and_hash(stage):
    installs = re.findall(r"^RUN pip install (.*)$", dockerfile(stage), re.MULTILINE)
    *lists, ours = installs
    assert ours.endswith("--no-deps --no-build-isolation .")
    assert lists and all(
        "--require-hashes --no-deps" in line and " -r requirements/images/" in line for line in lists
    )
    for file in (f"{stage}.txt", "common.txt", "torch-cpu.txt", "torch-cuda.txt"):
        assert all(len(digest) == 64 for digest in listed(file).values())


@pytest.mark.parametrize("stage", STAGES)
def test_image_contains_what_the_stage_imports_and_its_dependencies(stage):
    names = listed(f"{stage}.txt").keys()
    assert names == lock.of_stage(stage) - {"torch"}, "run requirements/lock.py again"
    assert ("torch" in lock.of_stage(stage)) == (stage != WITHOUT_TORCH)
    if stage != WITHOUT_TORCH:
        assert listed("common.txt").keys() <= names


def test_only_training_has_deepspeed_and_only_tables_have_pyarrow():
    assert [stage for stage in STAGES if "deepspeed" in listed(f"{stage}.txt")] == ["train"]
    assert [stage for stage in STAGES if "pyarrow" in listed(f"{stage}.txt")] == ["build-manifest"]
    assert [stage for stage in STAGES if "kubeflow" in listed(f"{stage}.txt")] == ["train"]
    assert not any("pytest" in listed(f"{stage}.txt") for stage in STAGES)


def test_imports_only_for_type_checkers_are_ignored(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import one\n"
        "def f():\n    import two.three\n"
    )
    assert third_party([str(source)]).keys() == {"two"}


def test_mistakes_are_one_sentence(tmp_path):
    def error_of(*options: str, **environment: str) -> str:
        command = [sys.executable, str(CHECKOUT / "images" / "build.py"), *options]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "there is no stage trian: STAGES may name build-manifest" in error_of("--stages", "trian")
    assert "convert-checkpoint uses torch's build without CUDA, which has an index of its own" in error_of(
        PATH=str(tmp_path)
    )
    assert "decode uses torch's build without CUDA" in error_of(
        "--torch", "cpu", "--stages", "build-manifest decode"
    )
    assert "there is no docker command" in error_of("--torch", "cuda", PATH=str(tmp_path))


def test_digest_of_an_image_on_docker_hub_is_found_by_its_short_name(monkeypatch):
    """Docker reports `team/train@sha256:…` for an image pushed as `docker.io/team/train`."""
    sys.path.insert(0, str(CHECKOUT / "images"))
    import build

    outputs = {
        "push": "",
        "inspect": json.dumps(["team/train@sha256:1", "registry.example/team/train@sha256:2"]),
    }
    monkeypatch.setattr(
        build.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, outputs[command[1]], ""),
    )
    assert build._push("docker.io/team/train:7") == "docker.io/team/train@sha256:1"
    assert build._push("registry.example/team/train:7") == "registry.example/team/train@sha256:2"
    with pytest.raises(build.BuildError, match="does not report its digest"):
        build._push("registry.example/other/train:7")


@pytest.fixture
def inside(images):
    """Run a command in a stage's image, without a network, as a user who does not exist in it."""

    def run(stage: str, *command: str, user: str = "4242:4343") -> str:
        options = ["--rm", "--network", "none", "--user", user, "--env", "_KFP_RUNTIME=true"]
        done = subprocess.run(
            ["docker", "run", *options, images.replace("{stage}", stage), *command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_image_reports_its_version_and_contains_all_its_imports(stage, inside, images):
    line = inside(stage, "slam-asr", "--version")
    assert re.fullmatch(
        rf"slam-asr {__version__} \(commit [0-9a-f]+\+?\), (no torch|torch 2[\d.]+\+cpu, CUDA none)\n", line
    )
    assert ("no torch" in line) == (stage == WITHOUT_TORCH)
    packages = sorted(third_party(lock.STAGES[stage]).keys() - lock.OURS)
    inside(stage, "python3", "-c", f"import {', '.join(packages)}")
    about = json.loads(
        subprocess.run(
            ["docker", "inspect", images.replace("{stage}", stage)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )[0]
    assert not about["Config"]["Entrypoint"] and about["Config"]["User"] == "1000"
    known = packages_distributions()
    assert known["torch"] == ["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("user", ["1000", "4242:4343"])
def test_any_user_may_write_where_a_step_writes(user, inside):
    script = (
        'touch /minio/x /s3/x /gcs/x "$SLAM_ASR_CACHE"/models/x "$HOME"/x '
        '&& python3 -c "import getpass; print(getpass.getuser())" && id -u'
    )
    assert inside("build-manifest", "sh", "-c", script, user=user).split() == ["slam", user.partition(":")[0]]


@pytest.mark.slow
def test_image_list_is_readable_for_compile(images, tmp_path):
    from components import images as images_of

    image_of = images_of(str(CHECKOUT / "build" / "images.yaml"))
    assert {stage: image_of[stage] for stage in STAGES} == {
        stage: f"slam-asr/{stage}:test" for stage in STAGES
    }


@pytest.fixture
def registry(docker_engine, tmp_path):
    """Start a local registry of images, and return its name."""
    try:
        install(["docker-registry"], ["docker-registry"])
    except NoEngine as reason:
        pytest.skip(f"needs a registry of images to push to: {reason}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{name}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\n"
    )
    server = subprocess.Popen(
        ["docker-registry", "serve", str(tmp_path / "registry.yml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", int(name.partition(":")[2])), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield name
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_pushed_images_are_listed_by_digest_and_found_by_doctor(images, registry):
    from pipelines.kubeflow.registry import check_image

    image_list = CHECKOUT / "build" / "images.yaml"
    before = image_list.read_text()
    name = f"{registry}/team/build-manifest"
    try:
        # Push the image that exists already: Docker's cache avoids a second build.
        options = [
            f"REGISTRY={registry}/team",
            "TAG=7",
            "PUSH=1",
            "STAGES=build-manifest",
            f"BASE_IMAGE={BASE}",
            "BUILD_ARGS=--network host",
        ]
        done = subprocess.run(
            ["make", "images", *options, f"PYTHON={sys.executable}"],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(
            line for line in image_list.read_text().splitlines() if line.startswith("build-manifest: ")
        )
    finally:
        image_list.write_text(before)
    pushed = line.removeprefix("build-manifest: ")
    assert re.fullmatch(rf"{name}@sha256:[0-9a-f]{{64}}", pushed)
    assert (
        check_image("build-manifest", pushed).sign == "✓"
        and check_image("build-manifest", f"{name}:7").sign == "✓"
    )
    missing = check_image("build-manifest", f"{name}:8")
    assert missing.sign == "✗" and "does not exist" in missing.detail
    subprocess.run(["docker", "rmi", "--force", f"{name}:7"], capture_output=True)
