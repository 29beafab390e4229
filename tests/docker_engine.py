"""A Docker engine for tests, and the images on it.

The engine is the machine's own, or one that is started here, with its own socket and folder. No registry is
needed, because the base image is a Debian that is built here. It contains torch's wheel, because pip may find
that wheel only in a folder of this machine, which a container cannot read.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from slam_asr.runtime.worker import die_with_parent

CHECKOUT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
BASE = f"slam-asr-test-base:bookworm-torch-{TORCH}"
BUILD_OPTIONS = (
    f"BASE_IMAGE={BASE}",
    "TORCH=cpu",
    "BUILD_ARGS=--network host",
    f"PYTHON={sys.executable}",
)
"""Options of `make images`. A second build with the same options takes all layers from Docker's cache."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = ["docker.io", "mmdebstrap"]


class NoEngine(Exception):
    """No Docker engine answers, and none can be started here."""


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[str]:
    """Yield the address of an engine that answers; start one in this folder if there is none."""
    if _answers(os.environ.get("DOCKER_HOST")):
        yield os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        return
    if os.geteuid() != 0:
        raise NoEngine("no Docker engine answers, and only root can start one")
    install(["dockerd"], PACKAGES)
    folder.mkdir(parents=True, exist_ok=True)
    address = f"unix://{folder}/docker.sock"
    command = [
        "dockerd",
        "--iptables=false",
        "--bridge=none",
        "--data-root",
        f"{folder}/data",
        "--exec-root",
        f"{folder}/exec",
        "--pidfile",
        f"{folder}/pid",
        "--host",
        address,
    ]
    with open(folder / "log", "w", encoding="utf-8") as log:
        daemon = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        deadline = time.monotonic() + 60
        while not _answers(address):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise NoEngine(f"dockerd does not start here: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.2)
        yield address
    finally:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(timeout=30)


def install(programs: list[str], packages: list[str]) -> None:
    """Install Debian's packages if one of the programs is missing."""
    if all(shutil.which(program) for program in programs):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoEngine(f"{' and '.join(programs)} cannot be installed here: that needs root and apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # apt fails while another worker of the tests installs packages, so one worker waits for the other.
    with open(Path(tempfile.gettempdir()) / "slam-asr-tests-apt.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(shutil.which(program) for program in programs):
            _apt_get(packages, environment)


def _apt_get(packages: list[str], environment: dict[str, str]) -> None:
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise NoEngine(f"{' '.join(packages)} cannot be installed here: {done.stderr[-300:]}")


def build_images(folder: Path, address: str) -> None:
    """Build all images: those of the steps, and the server's."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DOCKER_HOST": address}
    make_base(folder, environment)
    built = subprocess.run(
        ["make", "images", "TAG=test", *BUILD_OPTIONS],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]


def make_base(folder: Path, environment: dict[str, str]) -> None:
    """Make a stand-in for the public base image: Debian with Python, certificates and torch's wheel."""
    known = subprocess.run(["docker", "image", "inspect", BASE], env=environment, capture_output=True)
    if known.returncode == 0:
        return
    install(["mmdebstrap"], PACKAGES)
    wheels, root = folder / "wheels", folder / "base.tar"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    commands = [
        [*download, f"torch=={TORCH}"],
        [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            f"--customize-hook=upload {CERTIFICATES} {CERTIFICATES}",
            f"--customize-hook=copy-in {wheels} /opt",
            "bookworm",
            str(root),
        ],
        [
            "docker",
            "import",
            "--change",
            f"ENV PIP_CERT={CERTIFICATES} PIP_FIND_LINKS=/opt/wheels",
            str(root),
            BASE,
        ],
    ]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    root.unlink()


def _answers(address: str | None) -> bool:
    if not shutil.which("docker"):
        return False
    environment = os.environ | ({"DOCKER_HOST": address} if address else {})
    return subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode == 0
