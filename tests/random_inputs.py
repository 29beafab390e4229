"""Settings of the tests that draw random inputs, and a limit on the time that one input may take."""

import contextlib
import os
import random
import time
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

SOAK = bool(os.environ.get("SLAM_ASR_SOAK"))
TIMES_MORE = 250
"""Factor by which `make soak` draws more inputs."""


def number_of(inputs: int) -> int:
    return inputs * TIMES_MORE if SOAK else inputs


def examples(inputs: int) -> settings:
    """Settings that draw the same inputs in every run; `make soak` draws others, and many more."""
    return settings(
        max_examples=number_of(inputs),
        derandomize=not SOAK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def random_choices() -> random.Random:
    """A generator for tests that draw without hypothesis, with the same seed in every run but `make soak`."""
    return random.Random(None if SOAK else 0)


@contextlib.contextmanager
def within_a_second() -> Iterator[None]:
    """Fail if the body takes more than a second of CPU time, which does not depend on other programs."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 1
