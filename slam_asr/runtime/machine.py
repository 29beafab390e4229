"""The machine that a stage runs on: how many processes share it, and how much memory it has."""

from dataclasses import dataclass
from pathlib import Path

import torch

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with a container's memory limit, for cgroups version 2 and 1."""


@dataclass(frozen=True)
class Machine:
    """The machine on which a training run is about to run."""

    processes: int
    """Number of training processes on all machines."""
    local_processes: int
    """Number of training processes on this machine."""
    on_gpu: bool
    memory: float | None
    """Total memory of the smallest GPU in bytes or, without GPUs, the same as `host`. None if unknown."""
    host: float | None
    """Memory available on this host in bytes, from `host_memory`. None if unknown."""

    @property
    def capacity(self) -> float | None:
        """Memory for one process in bytes. None if unknown.

        Each process has a GPU of its own, but the processes on a host share the host's memory.
        """
        return self.memory if self.memory is None or self.on_gpu else self.memory / self.local_processes


def machine_of(device: torch.device, local_processes: int, nodes: int) -> Machine:
    """Describe this machine.

    Args:
        device: the device that trains.
        local_processes: number of processes on this machine.
        nodes: number of machines, each with as many processes as this one.
    """
    host = host_memory()
    on_gpu = device.type == "cuda"
    memory = gpu_memory(local_processes) if on_gpu else host
    return Machine(local_processes * nodes, local_processes, on_gpu, memory, host)


def gpu_memory(count: int) -> float | None:
    """Return the total memory, in bytes, of the smallest of the first `count` GPUs. None if unknown.

    The total is returned and not the free memory, because a process that asks for the free memory must create
    a CUDA context, which takes memory itself.
    """
    try:
        return float(min(torch.cuda.get_device_properties(i).total_memory for i in range(count)))
    except (RuntimeError, AssertionError, ValueError):
        return None


def host_memory() -> float | None:
    """Return the memory available on this host, in bytes, or None if it is unknown.

    If the unused part of the container's memory limit is smaller, that is returned. Memory that running
    processes take counts as used, for example that of this program and of Kubeflow's launcher.
    """
    known = [_remaining(path) for path in CGROUP_LIMITS]
    available = _numbers(Path("/proc/meminfo")).get("MemAvailable")
    if available is not None:
        known.append(1024 * available)  # the file counts in KiB
    return min((n for n in known if n is not None), default=None)


def _remaining(path: str) -> float | None:
    """Return the unused part of a container's memory limit, in bytes. None if it has no limit."""
    try:
        limit = float(int(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # in version 2, the file contains `max` if there is no limit
    used = _numbers(Path(path).with_name("memory.stat"))
    # Anonymous memory is `anon` in version 2 and `total_rss` in version 1; `shmem` is files in memory, such
    # as those in /dev/shm. The rest is cached files, which the kernel drops when memory becomes scarce.
    return max(0.0, limit - sum(used.get(name, 0.0) for name in ("anon", "total_rss", "shmem")))


def _numbers(file: Path) -> dict[str, float]:
    """Read a file of the kernel with a name and a number on each line; empty if it cannot be read."""
    try:
        lines = map(str.split, file.read_text(encoding="utf-8").splitlines())
        return {name.rstrip(":"): float(number) for name, number, *_ in lines}
    except (OSError, ValueError):
        return {}
