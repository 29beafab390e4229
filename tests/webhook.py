"""A webhook that saves the messages that it accepts, and answers with the statuses that a test chooses."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SECRET = "T0000-a-secret-that-nobody-may-see"


@dataclass
class Webhook:
    """The messages that the server accepted, and its next answers."""

    url: str = ""
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Content type and JSON of each message that was sent to `url` and answered with 200."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers, in order; after the last one, 200."""
    requests: int = 0


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Serve a webhook on this machine."""
    hook = Webhook()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hook.requests += 1
            status = hook.statuses.pop(0) if hook.statuses else 200
            if status == 200 and self.path == f"/{SECRET}":
                hook.messages.append((self.headers["content-type"], json.loads(body)))
            self.send_response(status)
            if status == 302:
                self.send_header("location", hook.url)
            self.send_header("content-length", "0")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hook.url = f"http://127.0.0.1:{server.server_address[1]}/{SECRET}"
        yield hook
        server.shutdown()
