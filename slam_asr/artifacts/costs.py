"""The wall time, the GPU-hours and, if prices are given, the cost of a run's steps.

A result that the store already had costs the run nothing. The time and cost of computing it, in an earlier
run, are shown in a column of their own.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slam_asr.artifacts.run_records import StepRecord
from slam_asr.errors import ConfigurationError
from slam_asr.progress import clock

PRICES = "SLAM_ASR_PRICES"
"""Environment variable with `Prices` in JSON."""
UNKNOWN = "–"
"""Text of a figure that cannot be computed."""


@dataclass
class Prices:
    """Prices of hardware, for the costs in reports and summaries."""

    gpu_hour: float = 0.0
    """Price of one GPU for one hour."""
    cpu_hour: float = 0.0
    """Price of one CPU core for one hour."""
    currency: str = "USD"
    """Currency of the prices."""

    def __bool__(self) -> bool:
        return bool(self.gpu_hour or self.cpu_hour)


@dataclass(frozen=True)
class CostRow:
    """One row of the cost table, as text."""

    step: str
    time: str
    gpu_hours: str
    cost: str
    """Empty if there are no prices."""
    reused: str
    """Time, GPU-hours and cost of the reused results when they were computed; empty if none was reused."""


def prices_from_environment() -> Prices:
    """Read the prices from the environment variable `PRICES`; all are 0 if it is not set.

    Raises:
        ConfigurationError: the variable's value is not valid.
    """
    try:
        prices = Prices(**json.loads(os.environ.get(PRICES) or "{}"))
        return replace(prices, gpu_hour=float(prices.gpu_hour), cpu_hour=float(prices.cpu_hour))
    except (ValueError, TypeError):
        raise ConfigurationError(
            f'{PRICES} is not valid: write it as {{"gpu_hour": 2.5, "cpu_hour": 0.05, "currency": "USD"}}.'
        ) from None


def cost_table(steps: Sequence[StepRecord], prices: Prices) -> list[CostRow]:
    """Return one row per step, which sums its work shards, and a last row for the run.

    A figure is `UNKNOWN` if a record lacks it, because an earlier version wrote that record.
    """
    rows = []
    for name in dict.fromkeys(step.stage for step in steps):
        of_step = [step for step in steps if step.stage == name]
        reused = [step for step in of_step if step.reused]
        note = ""
        if reused:
            time, gpu_hours, cost = _sums(reused, prices)
            some = "" if len(reused) == len(of_step) else f"{len(reused)} of {len(of_step)}: "
            note = f"{some}{time}, {gpu_hours} GPU-hours{f', {cost}' if cost else ''} when made"
        rows.append(CostRow(name, *_sums([step for step in of_step if not step.reused], prices), note))
    return [*rows, CostRow("this run", *_sums([step for step in steps if not step.reused], prices), "")]


def describe_costs(steps: Sequence[StepRecord], prices: Prices) -> str:
    """Format the cost table for a terminal.

    Empty if the run has no steps, or if there are no prices and all steps are known to have used no GPU.
    """
    if not steps or not (prices or any(step.gpus != 0 for step in steps)):
        return ""
    heading = CostRow("step", "time", "GPU-hours", "cost" if prices else "", "reused results")
    rows = [heading, *cost_table(steps, prices)]
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("step", "time", "gpu_hours", "cost")]
    return "\n".join(
        f"{row.step:<{widths[0]}}  {row.time:>{widths[1]}}  {row.gpu_hours:>{widths[2]}}"
        f"{f'  {row.cost:>{widths[3]}}' if prices else ''}  {row.reused}".rstrip()
        for row in rows
    )


def _sums(steps: Sequence[StepRecord], prices: Prices) -> tuple[str, str, str]:
    """Return the total wall time, GPU-hours and cost of some steps, as text."""
    gpu_hours = sum(_device_hours(step.seconds, step.gpus) for step in steps)
    core_hours = sum(_device_hours(step.seconds, step.cores) for step in steps)
    priced = ((prices.gpu_hour, gpu_hours), (prices.cpu_hour, core_hours))
    # An unknown number of devices that have no price does not make the cost unknown.
    cost = sum(price * hours for price, hours in priced if price)
    return (
        clock(sum(step.seconds for step in steps)),
        _figure(gpu_hours),
        _figure(cost, f" {prices.currency}") if prices else "",
    )


def _device_hours(seconds: float, devices: int | None) -> float:
    """Return the hours of some devices together; NaN if their number is unknown."""
    return math.nan if devices is None else seconds / 3600 * devices


def _figure(value: float, unit: str = "") -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.2f}{unit}"
