"""Divides a plan of work among n machines: each machine takes every n-th piece."""

import re
from dataclasses import dataclass

from slam_asr.errors import ConfigurationError


@dataclass(frozen=True)
class WorkShard:
    """One machine's share of a plan."""

    number: int = 1
    """Number of this work shard, counted from 1."""
    total: int = 1
    """Number of work shards that the plan is divided into."""

    def __str__(self) -> str:
        return f"{self.number}-of-{self.total}"

    def takes(self, piece: int) -> bool:
        """Whether this work shard includes a piece, counted from 0."""
        return piece % self.total == self.number - 1


def parse_work_shard(shard: str) -> WorkShard:
    """Parse `2/4` as the second of four work shards.

    Raises:
        ConfigurationError: the text is not i/n with i from 1 to n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigurationError(
            f"--work-shard is {shard}: write it as i/n, such as 1/4, with i from 1 to n."
        )
    return WorkShard(int(match[1]), int(match[2]))


def all_work_shards(count: int) -> list[str]:
    """Return the names of all `count` work shards: `1/count`, `2/count` and so on."""
    return [f"{number}/{count}" for number in range(1, count + 1)]
