"""Runs steps in containers, through the Docker engine's API.

kfp's Docker runner lets the engine remove a container when it ends, and treats a missing container as a
success, so a failed step occasionally counts as finished. Here, a container exists until its exit code has
been read. This module then removes it, even after an error or an interruption.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from components import CACHE
from pipelines import processes
from pipelines.kubeflow.registry import has_registry
from pipelines.run_request import Settings
from slam_asr.errors import ClusterError, ConfigurationError
from slam_asr.steps import STEPS
from slam_asr.storage.cache import cache_folder
from slam_asr.storage.client import SECRET, SECRET_FOLDER

GPU_STAGES = tuple(name for name, step in STEPS.items() if step.torch == "cuda")
"""Stages whose containers get the GPUs."""
LABEL = "slam-asr.run"
"""Label of a container: the run that it belongs to."""
GRACE = 15
"""Seconds that a step has to end by itself when the run is interrupted."""

_KILLED = 137
"""Exit code of a container that was killed: 128 plus SIGKILL."""
_PASSED_PREFIXES = ("AWS_", "HF_", "MLFLOW_", "MODEL_REGISTRY_", "NCCL_", "OMP_", "SLAM_ASR_S3_")
"""Prefixes of the environment variables that containers get from this process."""
_CREDENTIAL_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": ("~/.aws/credentials", "/run/aws/credentials"),
    "AWS_CONFIG_FILE": ("~/.aws/config", "/run/aws/config"),
    "AWS_WEB_IDENTITY_TOKEN_FILE": ("", "/run/aws/AWS_WEB_IDENTITY_TOKEN_FILE"),
    "AWS_CA_BUNDLE": ("", "/run/aws/AWS_CA_BUNDLE"),
    SECRET: (SECRET_FOLDER, SECRET_FOLDER),
}
"""Environment variables that name a file or folder: its default path on this machine, and its path in
containers."""
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
"""Environment variables that containers also get, in upper or lower case."""


class Containers:
    """Runs commands in containers, from one or several threads, and removes all of them at the end."""

    def __init__(self, settings: Settings, run: str, writable: list[Path], readable: list[Path]) -> None:
        """Connect to the engine and check all settings.

        Args:
            settings: options of the command line.
            run: the run's name, with which its containers are labelled. Entering the context removes the
                containers that an earlier, killed run with the same name left.
            writable: folders for results.
            readable: files and folders that the steps read.

        Raises:
            ClusterError: no engine answers, or it lacks the network or the GPUs.
            ConfigurationError: a path in `readable` or `--mounts` does not exist, or `--gpus` is not valid.
        """
        self.settings, self.run_name = settings, run
        try:
            self.client = docker.from_env()
            info = self.client.info()
        except DockerException as error:
            raise ClusterError(
                f"The Docker engine does not answer ({_reason(error)}): start it, set DOCKER_HOST, "
                "or join the group docker."
            ) from error
        self.gpus = _gpus(settings.gpus, info)
        self._require_network()
        self.writable = [*writable, cache_folder()]
        self.volumes = _volumes(writable, [*readable, *(Path(m).absolute() for m in settings.mounts or [])])
        self._running: dict[str, Any] = {}
        self._ending = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Containers":
        # The folders are created after all checks, so that a rejected run creates nothing, and before they
        # are mounted, because the engine would create a missing one as root.
        for folder in self.writable:
            folder.mkdir(parents=True, exist_ok=True)
        for container in self._containers_of_run():
            _remove(container)
        return self

    def __exit__(self, *_: object) -> None:
        # Another thread may be about to start a step: `run` checks this flag first.
        self._ending = True
        # A copy is made because stopping takes up to `GRACE` seconds, and the threads that wait for the steps
        # need the lock to finish.
        with self._lock:
            running = list(self._running.values())
        for container in running:
            _stop(container)
        for container in self._containers_of_run():
            _remove(container)
        self.client.close()

    def require_images(self, images: dict[str, str], log_line: Callable[[str], None]) -> None:
        """Check that every image exists locally; pull a missing one if its name includes a registry.

        Raises:
            ClusterError: an image is missing and cannot be pulled.
        """
        for stage, image in images.items():
            try:
                self.client.images.get(image)
            except ImageNotFound:
                if not has_registry(image):
                    raise ClusterError(
                        f"The Docker engine has no image {image} for {stage}: `make images` builds it, "
                        "or name others with --images."
                    ) from None
                log_line(f"pulling {image}")
                try:
                    self.client.images.pull(image)
                except APIError as error:
                    raise ClusterError(
                        f"{image}, the image of {stage}, cannot be pulled ({_reason(error)}): "
                        "check its name with --images, or `docker login`."
                    ) from error

    def run(
        self,
        stage: str,
        image: str,
        command: list[str],
        on_line: Callable[[str], None],
        environment: dict[str, str] | None = None,
    ) -> int:
        """Run `command` in a container and return its exit code.

        Args:
            stage: name of the stage; those in `GPU_STAGES` get the GPUs.
            image: the stage's image.
            command: program and arguments; the image's entrypoint is not used.
            on_line: called with each line of output.
            environment: additional environment variables.

        Returns:
            The exit code; 137, as for a killed container, if another thread has ended the run.

        Raises:
            ClusterError: the engine refuses or cannot start the container.
        """
        if self._ending:
            return _KILLED
        container = self._create(stage, image, command, environment or {})
        with self._removed_at_the_end(container), processes.stopped_on_interruption(lambda: _stop(container)):
            try:
                container.start()
            except APIError as error:
                raise ClusterError(f"The Docker engine cannot start {image} ({_reason(error)}).") from error
            for line in processes.decoded_lines(container.logs(stream=True, follow=True)):
                on_line(f"{line}\n")
            try:
                return container.wait()["StatusCode"]
            except NotFound:
                # Another thread ended the run and removed the container.
                return _KILLED

    def _create(self, stage: str, image: str, command: list[str], environment: dict[str, str]) -> Any:
        """Create the container of a stage without starting it. The arguments are those of `run`."""
        try:
            # `auto_remove` is not set, because it can hide that a step failed:
            # https://github.com/kubeflow/pipelines/issues/13332
            return self.client.containers.create(
                image,
                command,
                entrypoint=[],
                environment=_environment() | environment,
                volumes=self.volumes,
                # Results must belong to this user, not to root.
                user=f"{os.getuid()}:{os.getgid()}",
                network=self.settings.network,
                shm_size=self.settings.shared_memory,
                device_requests=self.gpus if stage in GPU_STAGES else [],
                labels={LABEL: self.run_name},
                # An init process passes SIGTERM on; a program with process id 1 ignores it by default.
                init=True,
                # The user may be unknown to the image, so the step starts in a folder that all may write.
                working_dir="/tmp",
            )
        except APIError as error:
            raise ClusterError(
                f"The Docker engine refuses a container of {image} ({_reason(error)})."
            ) from error

    @contextlib.contextmanager
    def _removed_at_the_end(self, container: Any) -> Iterator[None]:
        with self._lock:
            self._running[container.id] = container
        try:
            yield
        except BaseException:
            # After Ctrl-C, the step gets time to end by itself: `_remove` would kill it at once.
            _stop(container)
            raise
        finally:
            _remove(container)
            with self._lock:
                self._running.pop(container.id, None)

    def _containers_of_run(self) -> list[Any]:
        return self.client.containers.list(all=True, filters={"label": f"{LABEL}={self.run_name}"})

    def _require_network(self) -> None:
        known = [network.name for network in self.client.networks.list()]
        if self.settings.network not in known:
            raise ClusterError(
                f"The Docker engine has no network {self.settings.network}: "
                f"give --network one of {', '.join(sorted(known))}."
            )


def _volumes(writable: list[Path], readable: list[Path]) -> dict[str, dict[str, str]]:
    """Return all mounts, keyed by their path on this machine.

    Results and inputs are mounted at the same path as here, so that command lines work unchanged.

    Raises:
        ConfigurationError: a path in `readable` does not exist.
    """
    for path in readable:
        if not path.exists():
            raise ConfigurationError(
                f"{path} does not exist and cannot be mounted: check the path, or --mounts."
            )
    volumes = {str(path): {"bind": str(path), "mode": "ro"} for path in readable}
    # The writable ones come second: a path in both lists must be writable.
    volumes |= {str(path): {"bind": str(path), "mode": "rw"} for path in writable}
    volumes[str(cache_folder())] = {"bind": CACHE, "mode": "rw"}
    for source, target in _credential_files().items():
        volumes[source] = {"bind": target, "mode": "ro"}
    return volumes


def _credential_files() -> dict[str, str]:
    """Return the existing credential files of this machine, and where each is mounted in the container."""
    files = {
        os.path.expanduser(os.environ.get(name) or default): target
        for name, (default, target) in _CREDENTIAL_FILES.items()
    }
    return {source: target for source, target in files.items() if os.path.exists(source)}


def _environment() -> dict[str, str]:
    """Return the environment of a container: the variables of this process that the stages use."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_PREFIXES) or name.upper() in _PROXIES
    }
    # These variables contain paths of this machine, which are replaced by those in the container.
    mounted = _credential_files().values()
    for name, (default, target) in _CREDENTIAL_FILES.items():
        if target in mounted:
            passed[name] = target
        elif default:
            # The file does not exist here, so the stages must not look for it.
            passed.pop(name, None)
    # The hub's cache folders are not mounted. Models are in this project's own cache, which is mounted.
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        passed.pop(name, None)
    return passed | {"PYTHONUNBUFFERED": "1"}


def _gpus(requested: str, info: dict[str, Any]) -> list[docker.types.DeviceRequest]:
    if requested not in ("auto", "all", "none") and not requested.isdigit():
        raise ConfigurationError(f"--gpus is {requested}: give auto, all, none or a number.")
    available = "nvidia" in (info.get("Runtimes") or {}) or any(
        "nvidia" in str(d) for d in info.get("DiscoveredDevices") or []
    )
    if requested in ("none", "0") or (requested == "auto" and not available):
        return []
    if not available:
        raise ClusterError(
            f"--gpus is {requested}, but the Docker engine has no GPU: install NVIDIA's container toolkit, "
            "or leave --gpus out."
        )
    # To the engine, -1 means all GPUs.
    count = int(requested) if requested.isdigit() else -1
    return [docker.types.DeviceRequest(count=count, capabilities=[["gpu"]])]


def _stop(container: Any) -> None:
    with contextlib.suppress(APIError):
        container.stop(timeout=GRACE)


def _remove(container: Any) -> None:
    with contextlib.suppress(NotFound):
        container.remove(force=True, v=True)


def _reason(error: Exception) -> str:
    explained = getattr(error, "explanation", None) or str(error)
    return " ".join(str(explained).split()).rstrip(".")[:300]
