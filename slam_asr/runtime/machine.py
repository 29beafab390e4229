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
    """Processes of the training on all machines."""
    local_processes: int
    """Processes on this machine."""
    on_gpu: bool
    memory: float | None
    """Total memory of the smallest GPU in bytes; without GPUs, the same as `host`. None if unknown."""
    host: float | None
    """Memory available on this host in bytes, as from `host_memory`. None if unknown."""

    @property
    def capacity(self) -> float | None:
        """Memory for one process in bytes. None if unknown.

        Each process has a GPU of its own, but the processes on a host share its memory.
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
    """Total memory of the smallest of the first `count` GPUs in bytes. None if unknown.

    The free memory is not used, because a process that asks for it must create a CUDA context, which takes
    memory itself.
    """
    try:
        return float(min(torch.cuda.get_device_properties(i).total_memory for i in range(count)))
    except (RuntimeError, AssertionError, ValueError):
        return None


def host_memory() -> float | None:
    """Memory available on this host, or the rest of the container's limit if that is less, in bytes.

    None if unknown. Processes that run already count against the limit: this program, which starts those of
    the training, and Kubeflow's launcher.
    """
    known = [_remaining(path) for path in CGROUP_LIMITS]
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
        # /proc/meminfo counts in KiB.
        known.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    return min((n for n in known if n is not None), default=None)


def _remaining(path: str) -> float | None:
    """The unused part of a container's memory limit, in bytes; None if it has no limit."""
    try:
        limit = float(int(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # `max` if there is no limit
    try:
        lines = Path(path).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
        used = dict(line.split() for line in lines)
    except (OSError, ValueError):
        used = {}
    # Anonymous memory (version 2, version 1) and files in memory, such as /dev/shm. The rest is cached files,
    # which the kernel drops when memory becomes scarce.
    return max(0.0, limit - sum(float(used.get(name, 0)) for name in ("anon", "total_rss", "shmem")))
