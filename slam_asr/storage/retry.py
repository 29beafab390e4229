"""Retries of requests to object storage.

Failures that may be temporary (5xx, throttling, time-outs, resets, truncated answers) are retried with
growing pauses for `PATIENCE` seconds. Permanent failures (403, 404) are raised at once. `failures`
distinguishes the two.

Two libraries were considered for this loop and not used. botocore's retry modes count attempts, share one
quota among the threads of a client, so that all fail together, and do not retry an answer that breaks off
while its body is read. With tenacity, each policy of this loop (the last pause ends at the limit, three
failed checksums, the log, the final message) would be a function: 67 lines instead of 47, and 30 µs more per
call.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from slam_asr.errors import StorageError, UserError
from slam_asr.progress import log_line
from slam_asr.storage.client import seconds_from_environment
from slam_asr.storage.failures import CHECKSUM_DIFFERS, Damaged, reason_to_retry

T = TypeVar("T")

PATIENCE = "SLAM_ASR_S3_PATIENCE"
"""Environment variable: seconds for which temporary failures are retried."""
DEFAULT_PATIENCE = 120.0
_FIRST_PAUSE, _MAX_PAUSE = 0.1, 10.0
"""Seconds."""
_SILENT_SECONDS = 5.0
"""Seconds of retries before the first log line. Most temporary failures end sooner."""
_MAX_CHECKSUM_FAILURES = 3
"""The network may cause single checksum failures. After this many, an object that is read counts as damaged,
and a write fails."""


def patience() -> float:
    """Return the number of seconds for which temporary failures are retried.

    Raises:
        ConfigurationError: the environment variable is not a number, or is negative.
    """
    return seconds_from_environment(PATIENCE, DEFAULT_PATIENCE)


class Cancelled(Exception):
    """The call is no longer needed, because another part of the same transfer failed."""


def call_with_retries(
    uri: str, action: str, call: Callable[[], T], cancelled: threading.Event | None = None
) -> T:
    """Repeat a call until it succeeds, fails permanently, or has failed for `PATIENCE` seconds.

    Args:
        uri: URI of the object or bucket, for messages.
        action: what happens to the object, for messages: "read", "written", "listed" or "removed".
        call: a function that makes one attempt.
        cancelled: ends the retries at once when it is set.

    Returns:
        The result of the call.

    Raises:
        Cancelled: `cancelled` is set.
        ObjectMissing: the object does not exist.
        UserError: the call failed permanently, or for too long; or the limit is not valid.
        Exception: the call's own error, if it is not one of object storage or the network.
    """
    limit = patience()
    cancelled = cancelled or threading.Event()
    started = time.monotonic()
    pause, checksum_failures = _FIRST_PAUSE, 0
    while not cancelled.is_set():
        try:
            return call()
        # These are permanent, and need no other message.
        except UserError:
            raise
        # Every other exception is caught here, because botocore, urllib3 and ssl each have classes of their
        # own. `reason_to_retry` raises an error if the failure is permanent.
        except Exception as error:
            reason = reason_to_retry(error, uri, action)
        checksum_failures += reason == CHECKSUM_DIFFERS
        if checksum_failures >= _MAX_CHECKSUM_FAILURES:
            times = f"({reason}, {checksum_failures} times)"
            if action == "read":
                raise Damaged(f"{uri} is damaged {times}: write it again.")
            raise StorageError(f"{uri} arrives damaged {times}: check the network.")
        elapsed = time.monotonic() - started
        if elapsed >= limit:
            raise StorageError(
                f"{uri} could not be {action} within {elapsed:.0f} s of trying ({reason}): check "
                f"the network and AWS_ENDPOINT_URL, and run the same command again; {PATIENCE} sets the "
                "time limit."
            )
        if elapsed > _SILENT_SECONDS:
            log_line(f"{uri}: {reason}; trying for another {limit - elapsed:.0f} s")
        # Pauses are random, so that the programs of a cluster do not all retry at the same time.
        cancelled.wait(min(pause, limit - elapsed) * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _MAX_PAUSE)
    raise Cancelled
