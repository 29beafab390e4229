"""Notices of ended runs: the exit task of a pipeline, and the notice if that task did not succeed."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.cluster import Cluster
from slam_asr.errors import ConfigurationError
from slam_asr.notices.notice import URL, URL_FILE, Notice, send, webhook_url

if TYPE_CHECKING:
    from kfp import dsl

    from pipelines.kubeflow.run_view import RunView

STEP = "notify"
Steps = Callable[..., None]
"""A function that creates the tasks of a pipeline."""


def without_notice(steps: Steps) -> Steps:
    """Return the function of a pipeline unchanged."""
    return steps


def with_notice(
    cluster: Cluster, place: "Callable[[str, dsl.PipelineTask], None]"
) -> Callable[[Steps], Steps]:
    """Return a decorator for the function of a pipeline, which adds the exit task `notify`.

    kfp runs an exit task after the other tasks, also if one of them failed.

    Args:
        cluster: the profile.
        place: function that assigns the cluster's settings to a step's task.
    """

    def decorate(steps: Steps) -> Steps:
        @functools.wraps(steps)
        def pipeline(*args: object, **kwargs: object) -> None:
            from kfp import dsl

            from components.build_manifest.notify import notify

            task = notify(
                store=inspect.signature(steps).bind(*args, **kwargs).arguments["store"],
                form=cluster.on_exit.format,
                api=f"http://ml-pipeline.{cluster.kubeflow_namespace}:8888",
                dashboard=cluster.on_exit.dashboard or cluster.endpoint,
            )
            task.set_caching_options(False)
            place(STEP, task)
            with dsl.ExitHandler(task):
                steps(*args, **kwargs)

        return pipeline

    return decorate


def send_if_missing(run: "RunView", cluster: Cluster, link: str, log_line: Callable[[str], None]) -> None:
    """Send the notice of a run whose exit task did not succeed, for example because the run could not start.

    Args:
        run: the run, which has ended.
        cluster: the profile; nothing is sent if it requests no notices.
        link: address of the run's page.
        log_line: called with a line if the environment names no webhook.
    """
    if not cluster.on_exit.format or any(s.name == STEP and s.state == "succeeded" for s in run.steps):
        return
    url = webhook_url()
    if not url:
        log_line(
            "no notice was sent: the run did not send it, and here "
            f"neither {URL} nor the file that {URL_FILE} names has a URL"
        )
        return
    notice = Notice(run.run.display_name, run.run.run_id, run.state, *run.failure(), link=link)
    send(notice, cluster.on_exit.format, url)


def require_url(form: str) -> str:
    """Return the URL for the notice of a run on this machine.

    Raises:
        ConfigurationError: the environment names none, or one that begins with neither http:// nor https://.
    """
    url = webhook_url()
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"--on-exit {form} needs the URL of the webhook: set {URL} to an http:// or https:// address, or "
            f"{URL_FILE} to a file that contains it."
        )
    return url
