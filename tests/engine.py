"""A Docker engine for tests, and the images on it: the machine's own engine, or one started here.

No registry is needed: the base image is a Debian made on the spot, and torch's wheel comes from pip's own
sources by way of a small server. An engine that is started here has a socket and a folder of its own.
"""

import contextlib
import fcntl
import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from slam_asr.processes import die_with_parent

CHECKOUT = Path(__file__).resolve().parent.parent
BASE = "slam-asr-test-base:bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = ["docker.io", "mmdebstrap"]


class NoEngine(Exception):
    """This machine cannot run one."""


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[str]:
    """The address of an engine that answers."""
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
    with open(folder / "log", "w") as log:
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
    """Have Debian's packages here where a program is missing."""
    if all(shutil.which(program) for program in programs):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoEngine(f"{' and '.join(programs)} are missing, and cannot be installed here")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # apt fails if another worker of the tests is installing; whoever waited finds the programs there.
    with open(Path(tempfile.gettempdir()) / "slam-asr-tests-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(shutil.which(program) for program in programs):
            _apt_get(packages, environment)


def _apt_get(packages: list[str], environment: dict[str, str]) -> None:
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise NoEngine(f"{' '.join(packages)} cannot be installed here: {done.stderr[-300:]}")


def build_images(folder: Path, address: str) -> str:
    """Build all five images → what the build printed."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"DOCKER_HOST": address}
    make_base(folder, environment)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder / "wheels"),
            "torch==2.13.0",
        ],
        check=True,
        capture_output=True,
    )
    with serving(folder / "wheels") as wheels:
        built = subprocess.run(
            [
                "make",
                "images",
                f"BASE_IMAGE={BASE}",
                "TORCH=cpu",
                "TAG=test",
                f"PIP_ARGS=--find-links {wheels}",
                "BUILD_ARGS=--network host",
                f"PYTHON={sys.executable}",
            ],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return built.stdout


def make_base(folder: Path, environment: dict[str, str]) -> None:
    """A stand-in for the public base image: Debian with Python, and this machine's certificates."""
    if (
        subprocess.run(["docker", "image", "inspect", BASE], env=environment, capture_output=True).returncode
        == 0
    ):
        return
    install(["mmdebstrap"], PACKAGES)
    root = folder / "base.tar"
    commands = [
        [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            f"--customize-hook=upload {CERTIFICATES} {CERTIFICATES}",
            "bookworm",
            str(root),
        ],
        ["docker", "import", "--change", f"ENV PIP_CERT={CERTIFICATES}", str(root), BASE],
    ]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    root.unlink()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on this machine; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    try:
        # A fixed port: the address is a build argument, and another one would invalidate cached layers.
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 18_765), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def _answers(address: str | None) -> bool:
    if not shutil.which("docker"):
        return False
    environment = os.environ | ({"DOCKER_HOST": address} if address else {})
    return subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode == 0
