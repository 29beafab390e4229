"""Sends a message to a webhook when a run has ended.

The webhook's URL is a secret, because whoever knows it can post. It comes from the environment or a file, and
is never logged. The messages of urllib3's errors contain the URL, so only the name of an error's class is
logged.
"""

import html
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import urllib3

from slam_asr.progress import log_line

URL = "SLAM_ASR_WEBHOOK"
"""Environment variable with the URL of the webhook."""
URL_FILE = "SLAM_ASR_WEBHOOK_FILE"
"""Environment variable with the path of a file that contains the URL."""
PAUSES = (1.0, 4.0, 15.0)
"""Seconds before the first, second and third repetition of a message that did not arrive."""
_TIMEOUT = urllib3.Timeout(connect=5, read=10)


@dataclass(frozen=True)
class Notice:
    """How a run ended."""

    name: str
    """The run's display name; empty if unknown."""
    run_id: str
    state: str
    """succeeded, failed, stopped, lost, or ended if nothing else is known."""
    step: str = ""
    """The step that failed; empty if no step failed, or if it is unknown which one did."""
    reason: str = ""
    """Why the step or the run failed, without a full stop; empty if unknown."""
    result: str = ""
    """Result of a run that succeeded, such as `WER 9.57 % on 48 utterances`; empty if it has none."""
    link: str = ""
    """Address of the run's page in the dashboard."""

    def text(self) -> str:
        """Describe the end of the run in one sentence, with the link on a second line."""
        run = f"{self.name} (run {self.run_id})" if self.name else f"The run {self.run_id}"
        where = f" in {self.step}" if self.step else ""
        details = self.reason or self.result
        sentence = f"{run} {_VERBS.get(self.state, self.state)}{where}{f': {details}' if details else ''}."
        return f"{sentence}\n{self.link}" if self.link else sentence


_VERBS = {"stopped": "was stopped", "lost": "is lost"}
"""Verbs for the states whose name cannot follow `The run`. The other names, such as `failed`, can."""


def webhook_url() -> str:
    """Return the URL from the environment, or from the file that it names; empty if neither has a URL."""
    if url := os.environ.get(URL, "").strip():
        return url
    path = os.environ.get(URL_FILE)
    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else ""
    except (OSError, UnicodeDecodeError):
        return ""


def send(notice: Notice, form: str, url: str) -> bool:
    """Send a notice, and repeat it if it does not arrive. One line is logged about the outcome.

    Args:
        notice: the notice.
        form: format of the message, `slack` or `cloudevents`.
        url: URL of the webhook.

    Returns:
        Whether the notice arrived.
    """
    kind, body = _FORMATS[form](notice)
    problem = "its URL is empty or does not begin with http:// or https://"
    if url.startswith(("http://", "https://")):
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            problem = _post(url, kind, body)
            if not problem:
                log_line("the notice was sent")
                return True
    log_line(f"warning: the notice of the run's end ({notice.state}) did not reach the webhook: {problem}")
    return False


def _post(url: str, kind: str, body: bytes) -> str:
    """Send a message once, and return what went wrong; empty if nothing did."""
    try:
        # Redirects are not followed, because they could lead to another host. urllib3 must not repeat the
        # request, because it would log the URL.
        with urllib3.PoolManager(retries=False, timeout=_TIMEOUT) as pool:
            answer = pool.request("POST", url, body=body, headers={"Content-Type": kind}, redirect=False)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        return type(error).__name__
    return "" if 200 <= answer.status < 300 else f"it answered with HTTP {answer.status}"


def _slack(notice: Notice) -> tuple[str, bytes]:
    """Build Slack's message, which other chat services accept too.

    The characters `&`, `<` and `>` are escaped, because Slack uses them for markup:
    https://docs.slack.dev/messaging/formatting-message-text
    """
    text = html.escape(notice.text(), quote=False)
    return "application/json", json.dumps({"text": text}, ensure_ascii=False).encode()


def _cloudevents(notice: Notice) -> tuple[str, bytes]:
    """Build a CloudEvent 1.0 in structured mode.

    https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
    """
    event = {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": "urn:slam-asr",
        "type": f"slam-asr.run.{notice.state}",
        "subject": notice.run_id,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "datacontenttype": "application/json",
        "data": asdict(notice) | {"text": notice.text()},
    }
    return "application/cloudevents+json; charset=utf-8", json.dumps(event, ensure_ascii=False).encode()


_FORMATS = {"slack": _slack, "cloudevents": _cloudevents}
