"""Work that several machines share: each takes every n-th piece of the same plan."""

import re
from dataclasses import dataclass

from slam_asr.errors import UserError


@dataclass(frozen=True)
class WorkShard:
    """One of `of` parts that share a plan, counted from 1: it takes every `of`-th piece."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    def takes(self, piece: int) -> bool:
        """Whether a piece, counted from 0, is this part's."""
        return piece % self.of == self.number - 1


def parse_work_shard(shard: str) -> WorkShard:
    """`2/4` → the second of four parts.

    Raises:
        UserError: it is written otherwise, or there is no such part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard is {shard}: write it as i/n, such as 1/4, with i from 1 to n.")
    return WorkShard(int(found[1]), int(found[2]))


def all_work_shards(count: int) -> list[str]:
    """The parts that work is divided into: 1/n, 2/n and so on."""
    return [f"{number}/{count}" for number in range(1, count + 1)]
