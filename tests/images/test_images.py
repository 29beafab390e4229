"""Images share their first layers and contain exactly what their stage imports; mistakes are reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slam_asr.steps import IMAGES

CHECKOUT = Path(__file__).resolve().parents[2]
LISTS = CHECKOUT / "requirements" / "images"
sys.path[:0] = [str(CHECKOUT / "requirements"), str(CHECKOUT / "images")]

import build  # noqa: E402 - images/ is not a package
import lock  # noqa: E402 - requirements/ is not a package
from imports import third_party  # noqa: E402

WITHOUT_TORCH = ("build-manifest", "publish")


DOCKERFILE = (CHECKOUT / "images" / "Dockerfile").read_text()


def layers_of(stage: str, torch: str = "cpu") -> list[str]:
    """Return the lists of packages that a stage's image installs, in the order of its layers."""
    torch = "none" if stage in WITHOUT_TORCH else torch
    installs = re.findall(r"^RUN pip install .* -r requirements/images/(\S+)$", DOCKERFILE, re.MULTILINE)
    return [name.replace("${TORCH}", torch).replace("${STAGE}", stage) for name in installs]


def listed(file: str) -> dict[str, str]:
    """Read a list of packages; return the hash of each, keyed by its name."""
    lines = [line for line in (LISTS / file).read_text().splitlines() if not line.startswith("#")]
    return {re.match(r"[\w.-]+", line)[0]: line.partition("--hash=sha256:")[2] for line in lines}


def packages_of(stage: str, torch: str = "cpu") -> list[str]:
    """Return the packages in a stage's image."""
    return [name for file in layers_of(stage, torch) for name in listed(file)]


def test_layers_that_images_share_come_before_those_that_differ():
    assert layers_of("train") == ["common.txt", "torch-cpu.txt", "train.txt"]
    arguments = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    assert arguments.index("TORCH") < arguments.index("STAGE") < arguments.index("GIT_COMMIT")
    assert "ENTRYPOINT [" not in DOCKERFILE


def test_every_installed_package_is_pinned_by_version_and_hash():
    *lists, ours = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert ours.endswith("--no-deps --no-build-isolation .")
    assert lists and all(
        "--require-hashes --no-deps" in line and " -r requirements/images/" in line for line in lists
    )
    for file in LISTS.iterdir():
        assert all(len(digest) == 64 for digest in listed(file.name).values())


@pytest.mark.parametrize("stage", IMAGES)
def test_image_contains_what_the_stage_imports_and_its_dependencies(stage):
    names = packages_of(stage)
    assert set(names) == lock.of_stage(stage), "run requirements/lock.py again"
    assert len(set(names)) == len(names), "a package is installed by two layers"
    assert ("torch" in names) == (stage not in WITHOUT_TORCH)


def test_packages_for_one_stage_are_only_in_its_image_and_optional_ones_in_none():
    assert [stage for stage in IMAGES if "deepspeed" in packages_of(stage)] == ["train"]
    assert [stage for stage in IMAGES if "pyarrow" in packages_of(stage)] == ["build-manifest"]
    assert [stage for stage in IMAGES if "kubeflow" in packages_of(stage)] == ["train"]
    assert [stage for stage in IMAGES if "model-registry" in packages_of(stage)] == ["publish"]
    optional = {"pytest", "av", "liger-kernel", "mlflow-skinny", "wandb"}
    assert not any(optional & set(packages_of(stage)) for stage in IMAGES)


def test_imports_only_for_type_checkers_are_ignored(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import one\n"
        "def f():\n    import two.three\n"
    )
    assert third_party([str(source)]).keys() == {"two"}


def test_mistakes_are_refused_in_one_sentence(tmp_path):
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


def test_a_build_that_fails_beside_others_is_named_in_one_sentence(tmp_path):
    docker = tmp_path / "docker"
    docker.write_text(
        '#!/bin/sh\ncase "$*" in version*) echo 1;;\n'
        '*STAGE=decode*) echo "ERROR: no such package"; exit 1;; *) echo "Step 1/1 : FROM x";; esac\n'
    )
    docker.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "images" / "build.py"), "--torch", "cuda"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.returncode == 2
    assert re.fullmatch(r"images: error: slam-asr/decode:\S+ was not built \(.*\)\.\n", done.stderr), (
        done.stderr
    )
    # Each line is complete, although several builds write at once.
    for line in done.stdout.splitlines():
        assert re.fullmatch(r"building \S+|  \S+: (Step|ERROR).*", line), line


def test_digest_of_an_image_on_docker_hub_is_found_by_its_short_name(monkeypatch):
    """Docker reports `team/train@sha256:…` for an image pushed as `docker.io/team/train`."""
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


def test_images_are_loaded_into_a_throwaway_cluster(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    for tool, code in (("kind", 0), ("minikube", 1)):
        program = tmp_path / tool
        program.write_text(f'#!/bin/sh\necho {tool} "$@" >> {calls}\necho no such cluster >&2\nexit {code}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    build._load("kind", ["slam-asr/train:1", "slam-asr/decode:1"])
    assert calls.read_text().splitlines() == [
        "kind load docker-image slam-asr/train:1",
        "kind load docker-image slam-asr/decode:1",
    ]
    with pytest.raises(
        build.BuildError, match=r"was not loaded \(no such cluster\): check that the minikube"
    ):
        build._load("minikube", ["slam-asr/train:1"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match="there is no kind command: install it, or push"):
        build._load("kind", ["slam-asr/train:1"])
