"""Steps in containers, through the Docker engine's own API, and strictly.

kfp's Docker runner has the engine remove a container when it ends, and takes one that is gone for one that
succeeded: a failing step then counts as done now and then. Here a container stays until its exit code
has been read, and is removed by us, whatever happens.
"""

import codecs
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from components import CACHE
from slam_asr.errors import UserError
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.client import SECRET, SECRET_FOLDER

WITH_GPUS = ("extract-features", "train", "decode")
LABEL = "slam-asr.run"
GRACE = 15
"""Seconds that a step gets to end by itself when the run is interrupted."""

_PASSED_ON = ("AWS_", "HF_", "NCCL_", "OMP_", "SLAM_ASR_S3_")
_FILES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CA_BUNDLE")
"""Variables that name a file, which the container has to see too."""
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


@dataclass
class Settings:
    """What the user says of the containers."""

    network: str = "host"
    """The engine's network: host, none, or a name. With host, object storage on this machine answers at its usual address."""
    gpus: str = "auto"
    """all, none, or a number; auto takes all where the engine has NVIDIA's runtime."""
    shared_memory: str = "8g"
    """Size of /dev/shm."""
    mounts: list[str] = field(default_factory=list)
    """More folders that the steps read, such as those that a list of audio files names; seen at the same place, read-only."""


class Containers:
    """Runs commands in containers, one after another or side by side, and leaves none behind."""

    def __init__(self, settings: Settings, run: str, writable: list[Path], readable: list[Path]) -> None:
        """Find the engine.

        Args:
            settings: the user's.
            run: what tells this run's containers from others': those that a killed run left are removed.
            writable: folders for results.
            readable: files and folders that the steps read.

        Raises:
            UserError: no engine, no such network, no GPU where one is asked for, or a folder that is not there.
        """
        self.settings, self.run_name = settings, run
        try:
            self.client = docker.from_env()
            info = self.client.info()
        except DockerException as error:
            raise UserError(
                f"The Docker engine does not answer ({_reason(error)}): start it, set DOCKER_HOST, or join the group docker."
            ) from error
        self.gpus = _gpus(settings.gpus, info)
        self._require_network()
        self.writable = [*writable, cache_folder()]
        self.volumes = _volumes(writable, [*readable, *(Path(m).absolute() for m in settings.mounts)])
        self._running: dict[str, Any] = {}
        self._ending = False
        self._guard = threading.Lock()

    def __enter__(self) -> "Containers":
        # Not before everything has been looked at: what is refused leaves nothing behind. And not left to the engine, which
        # would make them as root.
        for folder in self.writable:
            folder.mkdir(parents=True, exist_ok=True)
        for left in self._ours():
            _remove(left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Another thread may be about to start a step: it finds this and does not.
        self._ending = True
        with self._guard:
            running = list(self._running.values())
        for container in running:
            with contextlib.suppress(APIError):
                container.stop(timeout=GRACE)
        for container in self._ours():
            _remove(container)
        self.client.close()

    def require_images(self, images: dict[str, str], log_line: Callable[[str], None]) -> None:
        """Have every image here before the first step starts; one whose name has a registry is pulled.

        Raises:
            UserError: an image that is not here, and cannot be had.
        """
        for stage, image in images.items():
            try:
                self.client.images.get(image)
            except ImageNotFound:
                if not _has_registry(image):
                    raise UserError(
                        f"There is no image {image} for {stage} here: `make images` builds it, or name others with --images."
                    ) from None
                log_line(f"pulling {image}")
                try:
                    self.client.images.pull(image)
                except APIError as error:
                    raise UserError(
                        f"{image}, the image of {stage}, cannot be pulled ({_reason(error)}): check its name with --images, or `docker login`."
                    ) from error

    def run(
        self,
        stage: str,
        image: str,
        command: list[str],
        hear: Callable[[str], None],
        environment: dict[str, str] | None = None,
    ) -> int:
        """Run `command`, pass each line of its output to `hear`, and give its exit code.

        Raises:
            UserError: the engine refuses the container.
        """
        if self._ending:
            return 137
        try:
            container = self.client.containers.create(
                image,
                command,
                entrypoint=[],
                environment=_environment() | (environment or {}),
                volumes=self.volumes,
                user=f"{os.getuid()}:{os.getgid()}",
                network=self.settings.network,
                shm_size=self.settings.shared_memory,
                device_requests=self.gpus if stage in WITH_GPUS else [],
                labels={LABEL: self.run_name},
                init=True,
                working_dir="/tmp",
            )
        except APIError as error:
            raise UserError(
                f"The Docker engine refuses a container of {image} ({_reason(error)})."
            ) from error
        with self._kept(container):
            try:
                container.start()
            except APIError as error:
                raise UserError(f"The Docker engine cannot start {image} ({_reason(error)}).") from error
            for line in _lines(container.logs(stream=True, follow=True)):
                hear(line)
            try:
                return container.wait()["StatusCode"]
            except NotFound:
                # Another thread ended the run and removed it.
                return 137

    @contextlib.contextmanager
    def _kept(self, container: Any) -> Iterator[None]:
        with self._guard:
            self._running[container.id] = container
        try:
            yield
        except BaseException:
            with contextlib.suppress(APIError):
                container.stop(timeout=GRACE)
            raise
        finally:
            _remove(container)
            with self._guard:
                self._running.pop(container.id, None)

    def _ours(self) -> list[Any]:
        return self.client.containers.list(all=True, filters={"label": f"{LABEL}={self.run_name}"})

    def _require_network(self) -> None:
        known = [network.name for network in self.client.networks.list()]
        if self.settings.network not in known:
            raise UserError(
                f"The Docker engine has no network {self.settings.network}: --network may be {', '.join(sorted(known))}."
            )


def _volumes(writable: list[Path], readable: list[Path]) -> dict[str, dict[str, str]]:
    """Everything at the place that it has here, so that paths mean the same; and the cache of models."""
    for path in readable:
        if not path.exists():
            raise UserError(
                f"There is nothing at {path}, which the containers are to see: check the path, or --mounts."
            )
    volumes = {str(path): {"bind": str(path), "mode": "ro"} for path in readable}
    volumes |= {str(path): {"bind": str(path), "mode": "rw"} for path in writable}
    volumes[str(cache_folder())] = {"bind": CACHE, "mode": "rw"}
    for source, target in _credential_files().items():
        volumes[source] = {"bind": target, "mode": "ro"}
    return volumes


def _credential_files() -> dict[str, str]:
    """AWS's own files and a mounted secret, as far as they are here, and where the container sees them."""
    files = {
        os.path.expanduser(
            os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
        ): "/run/aws/credentials",
        os.path.expanduser(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"): "/run/aws/config",
        os.environ.get(SECRET) or SECRET_FOLDER: SECRET_FOLDER,
    }
    files |= {os.environ[name]: f"/run/aws/{name}" for name in _FILES if os.environ.get(name)}
    return {source: target for source, target in files.items() if os.path.exists(source)}


def _environment() -> dict[str, str]:
    """What the programs in the containers look at, as it is here."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_ON) or name.upper() in _PROXIES
    }
    for name in _FILES:
        if name in passed and os.path.exists(passed[name]):
            passed[name] = f"/run/aws/{name}"
    targets = _credential_files().values()
    for name, target in (
        ("AWS_SHARED_CREDENTIALS_FILE", "/run/aws/credentials"),
        ("AWS_CONFIG_FILE", "/run/aws/config"),
        (SECRET, SECRET_FOLDER),
    ):
        passed.pop(name, None)
        if target in targets:
            passed[name] = target
    # Models lie in the cache, which the container has; the hub's own folder is not mounted.
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        passed.pop(name, None)
    return passed | {"PYTHONUNBUFFERED": "1"}


def _gpus(wanted: str, info: dict[str, Any]) -> list[docker.types.DeviceRequest]:
    there = "nvidia" in (info.get("Runtimes") or {}) or any(
        "nvidia" in str(d) for d in info.get("DiscoveredDevices") or []
    )
    if wanted == "none" or (wanted == "auto" and not there):
        return []
    if wanted not in ("auto", "all") and not wanted.isdigit():
        raise UserError(f"--gpus is {wanted}: give auto, all, none or a number.")
    if wanted == "0":
        return []
    if not there:
        raise UserError(
            f"--gpus is {wanted}, but the Docker engine has no GPU: install NVIDIA's container toolkit, or leave --gpus out."
        )
    return [docker.types.DeviceRequest(count=int(wanted) if wanted.isdigit() else -1, capabilities=[["gpu"]])]


def _has_registry(image: str) -> bool:
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines of a log that comes in pieces; the engine cuts neither at lines nor at characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from (f"{line}\n" for line in whole)
    if rest:
        yield f"{rest}\n"


def _remove(container: Any) -> None:
    with contextlib.suppress(NotFound):
        container.remove(force=True, v=True)


def _reason(error: Exception) -> str:
    explained = getattr(error, "explanation", None) or str(error)
    return " ".join(str(explained).split()).rstrip(".")[:300]
