"""Learning-rate schedules."""

import math
from collections.abc import Callable


def learning_rate_schedule(
    kind: str, peak: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Create a function from step (the first is 1) to learning rate.

    The rate rises linearly to `peak` over `warmup_steps`. Then it stays there (`constant`, as in the SLAM-ASR
    paper) or falls to zero at the last step (`linear`, `cosine`).

    Args:
        kind: `constant`, `linear` or `cosine`.
        peak: highest learning rate.
        warmup_steps: steps of the linear rise.
        total_steps: steps of the training.

    Returns:
        A function from step to learning rate.
    """

    def rate(step: int) -> float:
        # With 0 warm-up steps this is never true, because steps begin at 1; so nothing is divided by 0.
        if step <= warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind == "linear":
            return peak * (1 - progress)
        if kind == "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        return peak

    return rate
