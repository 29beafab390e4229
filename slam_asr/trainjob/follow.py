"""A TrainJob from its creation to its end: its lines and states passed on, its failure explained, itself removed."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator

from slam_asr.errors import UserError
from slam_asr.progress import log_line
from slam_asr.trainjob.request import NODE, Trainer, cause_of, status_of

POLL = 5.0
"""Seconds between two looks at the job."""
_ERROR = "slam-asr: error: "


class FollowedTrainJob:
    """One TrainJob, from its creation to its end."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer, self.name, self.client = trainer, name, trainer.client
        self._heard = 0
        self._told: set[str] = set()

    def find_or_create(self, nodes: int, command: list[str]) -> bool:
        """Go on with a job that an earlier attempt of this step left, or create one → whether it is new."""
        try:
            left = self.client.get_job(self.name)
        except RuntimeError as error:
            if status_of(error) != 404:
                raise
            left = None
        if left is not None and left.status == "Failed":
            self.client.delete_job(self.name)
            self._until_gone()
            left = None
        if left is None:
            self.trainer.create(self.name, nodes, command)
        return left is None

    def follow(self, seconds: float) -> None:
        """Pass on the first node's lines and what happens to the job, until it is complete.

        Args:
            seconds: after which it is given up; 0: never.

        Raises:
            UserError: it failed, was deleted by somebody, or takes too long.
        """
        started, state, lost = time.monotonic(), "", 0.0
        listening: threading.Thread | None = None
        while True:
            try:
                job, lost = self.client.get_job(self.name), 0.0
            except (RuntimeError, TimeoutError) as error:
                if status_of(error) == 404:
                    raise UserError(
                        f"TrainJob {self.name} was deleted while it ran: start the step again."
                    ) from None
                # The API server may be away for a while; the job goes on without us.
                lost = lost or time.monotonic()
                if time.monotonic() - lost > 600:
                    raise UserError(
                        f"Kubernetes has not answered for 10 minutes ({cause_of(error)}): TrainJob {self.name} may go on; start the step again to watch it."
                    ) from None
                time.sleep(POLL)
                continue
            if job.status != state:
                state = job.status
                log_line(f"TrainJob {self.name}: {state.lower()}")
            running = any(
                step.name == f"{NODE}-0" and step.status not in (None, "Pending") for step in job.steps
            )
            if (
                running
                and (listening is None or not listening.is_alive())
                and state not in ("Complete", "Failed")
            ):
                listening = threading.Thread(target=self._listen, daemon=True)
                listening.start()
            if not running:
                self._tell_what_it_waits_for()
            if state in ("Complete", "Failed"):
                if listening is not None:
                    listening.join(timeout=10)
                self._hear(follow=False)
                if state == "Failed":
                    raise UserError(self._why())
                return
            if seconds and time.monotonic() - started > seconds:
                raise UserError(
                    f"TrainJob {self.name} has not ended after {seconds / 3600:g} h: raise trainer.timeout_hours in the cluster's profile, or look at what it waits for."
                )
            time.sleep(POLL)

    def delete(self) -> None:
        """Remove the job with its pods; nothing is said where it is gone already."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.client.delete_job(self.name)

    def _until_gone(self) -> None:
        for _ in range(60):
            try:
                self.client.get_job(self.name)
            except RuntimeError as error:
                if status_of(error) == 404:
                    return
            time.sleep(POLL / 5)
        raise UserError(
            f"TrainJob {self.name} of an earlier attempt does not go away: `kubectl -n {self.trainer.placement.namespace} delete trainjob {self.name}`."
        )

    def _listen(self) -> None:
        # A connection that broke is made again by `follow`, and goes on behind what was heard.
        with contextlib.suppress(Exception):
            self._hear(follow=True)

    def _hear(self, follow: bool) -> None:
        with contextlib.suppress(RuntimeError):
            # The SDK leaves out empty lines when it follows, and only then.
            lines = (
                line
                for line in self.client.get_job_logs(self.name, follow=follow, step=f"{NODE}-0")
                if line.strip()
            )
            for line in itertools.islice(lines, self._heard, None):
                self._heard += 1
                log_line(line.rstrip("\n"))

    def _tell_what_it_waits_for(self) -> None:
        with contextlib.suppress(Exception):
            for event in self.client.get_job_events(self.name):
                text = " ".join(event.message.split())
                if (
                    event.reason in ("FailedScheduling", "Failed", "FailedMount", "BackOff", "FailedCreate")
                    and text not in self._told
                ):
                    self._told.add(text)
                    log_line(f"TrainJob {self.name} waits: {event.reason}: {text}")

    def _why(self) -> str:
        """The sentence of the node that failed; the other nodes' last lines are passed on."""
        said = None
        nodes = [step for step in self.client.get_job(self.name).steps if step.name.startswith(f"{NODE}-")]
        for step in sorted(nodes, key=lambda step: step.name):
            lines: list[str] = []
            with contextlib.suppress(RuntimeError):
                lines = list(self.client.get_job_logs(self.name, step=step.name))
            if step.name != f"{NODE}-0":
                for line in lines[-10:]:
                    log_line(f"{step.name}: {line}")
            mistakes = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
            # A process that ends because another one did says only that.
            own = [m for m in mistakes if not m.startswith("A training process ended with code")]
            said = said or next(iter(own), None)
        return (
            said
            or f"TrainJob {self.name} failed: its nodes' last lines stand above; `kubectl describe` of its pods says more where they were killed."
        )


@contextlib.contextmanager
def deleted_when_interrupted(job: FollowedTrainJob) -> Iterator[None]:
    """Have SIGTERM, with which Kubernetes ends a pod, take the job along: its GPUs would be paid for by nobody."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        log_line(f"interrupted: deleting TrainJob {job.name}")
        job.delete()
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
