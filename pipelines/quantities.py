"""Sizes, CPU cores and times in the notation of Kubernetes and of cluster profiles."""

import re

CPU = re.compile(r"\d+(\.\d+)?|\d+m")
SIZE = re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|K|M|G|T)?")
DURATION = re.compile(r"\d+[smh]")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def size_in_bytes(size: str) -> float:
    """Convert a size in Kubernetes notation to bytes: `16Gi` → 17179869184.

    Args:
        size: a size that the profile's check accepts, such as `16Gi`, `500M` or `1024`.

    Returns:
        The size in bytes.
    """
    number = size.rstrip("kKMGTi")
    unit = size.removeprefix(number)
    return float(number) * _UNITS[unit]


def cores(cpu: str) -> float:
    """Convert cores in Kubernetes notation to a number: `500m` → 0.5."""
    return float(cpu.removesuffix("m")) / (1000 if cpu.endswith("m") else 1)


def seconds(time: str) -> int:
    """Convert a time to seconds: `5m` → 300."""
    return int(time[:-1]) * {"s": 1, "m": 60, "h": 3600}[time[-1]]
