"""The CPU cores that this process may use, and the number of threads that fits them.

A container's CPU limit is often below the machine's number of cores, but libraries look only at the latter.
Threads beyond the limit do not help: once they have used up the limit, the kernel stops all of them for the
rest of the period (100 ms). In a pod with half a core, two threads took three times as long as one.
"""

import math
import os
from pathlib import Path

CPU_MAX = "/sys/fs/cgroup/cpu.max"
"""File of cgroups version 2 with two numbers in microseconds: the CPU time that a container may use in each
period (`max` without a limit), and the period."""
CPU_CFS = ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")
"""Files of cgroups version 1 with the same two numbers; the CPU time is -1 without a limit."""
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
"""Environment variables that set the number of threads: that of torch and NumPy, and that of tokenizers."""

LIMITED = "SLAM_ASR_LIMITED"
"""Environment variable with the names in `THREADS` that `limit_threads`, not the user, has set."""


def usable_cores() -> int:
    """Return the number of cores that this process may use: at least 1, at most its container's CPU limit.

    A fraction of a core counts as a core, as in the runtimes of Go and Java.
    """
    cores, limit = _cores(), _limit()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def thread_limits(processes: int = 1) -> dict[str, str]:
    """Return environment variables that give each of several processes its share of the cores.

    Without them, each process would start threads for all cores. Variables that the user has set are not
    included.
    """
    threads = str(max(1, usable_cores() // processes))
    ours = os.environ.get(LIMITED, "").split()
    return {name: threads for name in THREADS if name not in os.environ or name in ours}


def limit_threads() -> None:
    """Limit the threads of this process to its container's CPU limit, if that is below its cores.

    Libraries read the variables when they are loaded, so this must be called before torch is imported.
    """
    if usable_cores() < _cores():
        limits = thread_limits()
        os.environ.update(limits | {LIMITED: " ".join(limits)})


def _cores() -> int:
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit() -> float | None:
    """Return the container's CPU limit in cores; None if it has none."""
    for quota_and_period in (_words(CPU_MAX), _words(*CPU_CFS)):
        try:
            quota, period = map(float, quota_and_period)
        except ValueError:  # no such file, or `max`: no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def _words(*paths: str) -> list[str]:
    try:
        return [word for path in paths for word in Path(path).read_text(encoding="utf-8").split()]
    except OSError:
        return []
