"""Follow a TrainJob from its creation to its end: log its output and states, explain a failure, delete it."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from slam_asr.errors import ERROR_PREFIX, ClusterError, UserError
from slam_asr.progress import log_line
from slam_asr.trainjob.request import NODE, TrainJobClient, cause_of, status_of
from slam_asr.trainjob.waiting import waiting_nodes

if TYPE_CHECKING:
    from kubeflow.trainer.types.types import TrainJob

POLL = 5.0
"""Seconds between two requests for the job's state."""


class FollowedTrainJob:
    """One TrainJob, from its creation to its end.

    Args:
        trainer: client that creates the job.
        name: name of the job.
    """

    def __init__(self, trainer: TrainJobClient, name: str) -> None:
        self.trainer, self.name, self.client = trainer, name, trainer.client
        self._lines_logged = 0
        self._waits_logged: set[tuple[str, str]] = set()

    def find_or_create(self, nodes: int, command: list[str]) -> bool:
        """Find the job that an earlier attempt at this step created, or create a job.

        An earlier job that failed is deleted first, so that the step can be retried.

        Args:
            nodes: number of pods.
            command: program and arguments that each node runs.

        Returns:
            Whether the job is new.

        Raises:
            ClusterError: the failed job still exists a minute after its deletion was requested.
            RuntimeError: a request of the SDK failed; see `explained_refusals`.
            TimeoutError: Kubernetes does not answer.
        """
        existing = self._job()
        if existing is not None and existing.status == "Failed":
            self.client.delete_job(self.name)
            self._until_gone()
            existing = None
        if existing is None:
            self.trainer.create(self.name, nodes, command)
        else:
            self.trainer.adopt(self.name)
        return existing is None

    def follow(self, seconds: float) -> None:
        """Log the first node's output and the job's states until it is complete.

        Args:
            seconds: time limit in seconds; 0 means no limit.

        Raises:
            ClusterError: somebody else deleted the job, the job takes too long, or Kubernetes has not
                answered for 10 minutes.
            UserError: the job failed. The message is that of the failed node.
        """
        started, state, unreachable_since = time.monotonic(), "", 0.0
        log_thread: threading.Thread | None = None
        while True:
            try:
                job, unreachable_since = self._job(), 0.0
            except (RuntimeError, TimeoutError) as error:
                # The API server may be unreachable for a while; the job continues in the meantime.
                unreachable_since = unreachable_since or time.monotonic()
                if time.monotonic() - unreachable_since > 600:
                    raise ClusterError(
                        f"Kubernetes has not answered for 10 minutes ({cause_of(error)}): TrainJob "
                        f"{self.name} may still be running; start the step again to follow it."
                    ) from None
                time.sleep(POLL)
                continue
            if job is None:
                raise ClusterError(f"TrainJob {self.name} was deleted while it ran: start the step again.")
            if job.status != state:
                state = job.status
                log_line(f"TrainJob {self.name}: {state.lower()}")
            ended = state in ("Complete", "Failed")
            running = {s.name for s in job.steps if s.status not in (None, "Pending")}
            if not ended and len(running) < job.num_nodes:
                self._log_waits(job)
            if f"{NODE}-0" in running and not ended and (log_thread is None or not log_thread.is_alive()):
                log_thread = threading.Thread(target=self._follow_output, daemon=True)
                log_thread.start()
            if ended:
                if log_thread is not None:
                    log_thread.join(timeout=10)
                # The thread may have lost its connection before the last lines, so those are read here.
                self._log_output(follow=False)
                if state == "Failed":
                    raise UserError(self._failure())
                return
            if seconds and time.monotonic() - started > seconds:
                raise ClusterError(
                    f"TrainJob {self.name} has not ended after {seconds / 3600:g} h: raise "
                    "trainer.timeout_hours in the cluster's profile, or see in the log what it waits for."
                )
            time.sleep(POLL)

    def delete(self) -> None:
        """Delete the job with its pods; it may already be deleted."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.client.delete_job(self.name)

    def _job(self) -> "TrainJob | None":
        """Return the job's present state; None if the job does not exist."""
        try:
            return self.client.get_job(self.name)
        except RuntimeError as error:
            if status_of(error) == 404:
                return None
            raise

    def _until_gone(self) -> None:
        # Waits for about a minute: by default, a pod has 30 seconds to end.
        for _ in range(60):
            with contextlib.suppress(RuntimeError):
                if self._job() is None:
                    return
            time.sleep(POLL / 5)
        raise ClusterError(
            f"TrainJob {self.name} of an earlier attempt is still not deleted: run `kubectl -n "
            f"{self.trainer.placement.namespace} delete trainjob {self.name}`."
        )

    def _follow_output(self) -> None:
        # If the connection breaks, `follow` starts a new thread, which continues after the lines already
        # logged.
        with contextlib.suppress(Exception):
            self._log_output(follow=True)

    def _log_output(self, follow: bool) -> None:
        with contextlib.suppress(RuntimeError):
            # The SDK drops empty lines only while it follows a log. Here they are always dropped, so that
            # `_lines_logged` counts the same lines in both cases.
            log = self.client.get_job_logs(self.name, follow=follow, step=f"{NODE}-0")
            lines = (line for line in log if line.strip())
            # Each connection yields the log from its first line.
            for line in itertools.islice(lines, self._lines_logged, None):
                self._lines_logged += 1
                log_line(line.rstrip("\n"))

    def _log_waits(self, job: "TrainJob") -> None:
        """Log which nodes do not run yet, and why. A reason is logged again only if it is new for a node."""
        # The reasons are only for the log, so a failure to read them must not stop the step.
        with contextlib.suppress(Exception):
            namespace, created = self.trainer.placement.namespace, job.creation_timestamp
            waits = waiting_nodes(self.trainer.core_api, namespace, self.name, job.num_nodes, created)
            run = job.num_nodes - sum(map(len, waits.values()))
            for reason, nodes in waits.items():
                if self._waits_logged.issuperset((node, reason) for node in nodes):
                    continue
                self._waits_logged.update((node, reason) for node in nodes)
                log_line(
                    f"TrainJob {self.name}: {run} of {job.num_nodes} nodes run; {listed(nodes)} "
                    f"{'waits' if len(nodes) == 1 else 'wait'}: {reason}"
                )

    def _failure(self) -> str:
        """Log the last lines of every node but the first, and return the error message of the failed node.

        The first node's output is already in the log.
        """
        message = None
        nodes = [step for step in self.client.get_job(self.name).steps if step.name.startswith(f"{NODE}-")]
        for step in sorted(nodes, key=lambda step: step.name):
            lines: list[str] = []
            with contextlib.suppress(RuntimeError):
                lines = list(self.client.get_job_logs(self.name, step=step.name))
            if step.name != f"{NODE}-0":
                for line in lines[-10:]:
                    log_line(f"{step.name}: {line}")
            errors = [line.partition(ERROR_PREFIX)[2] for line in lines if ERROR_PREFIX in line]
            # A node that ends because another one failed reports only an exit code, which is not the cause.
            causes = [e for e in errors if not e.startswith("A training process ended with code")]
            message = message or next(iter(causes), None)
        return (
            message
            or f"TrainJob {self.name} failed: its nodes' last lines are above; if they were killed, "
            "`kubectl describe` of its pods shows why."
        )


def listed(nodes: list[str]) -> str:
    """Join the names of nodes for a message. If there are more than eight, only the first six are named."""
    if len(nodes) > 8:
        return f"{', '.join(nodes[:6])} and {len(nodes) - 6} others"
    return " and ".join(filter(None, (", ".join(nodes[:-1]), nodes[-1])))


@contextlib.contextmanager
def deleted_when_interrupted(job: FollowedTrainJob) -> Iterator[None]:
    """Delete the job if the block is interrupted, for example when Kubernetes ends this pod with SIGTERM.

    Otherwise, the job would continue to occupy its GPUs although nobody follows it.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Python allows signal handlers only in the main thread.
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        log_line(f"interrupted: deleting TrainJob {job.name}")
        job.delete()
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
